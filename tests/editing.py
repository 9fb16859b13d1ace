"""FlowEdit and FlowAlign written a second time, from the papers' velocity form, in float64 on the bare network."""

from itertools import pairwise
from unittest.mock import patch

import comfy.ldm.krea2.model
import comfy.model_management
import comfy.quant_ops
import numpy as np
import torch
from comfy_kitchen.backends.eager.rope import rms_rope_split_half
from comfyui_softrepa.softrepa.comfy.editing.flowedit import FlowEditGuider, FlowEditSampler, edit_latent, edit_sigmas
from comfyui_softrepa.softrepa.editing.flowedit import Draws
from comfyui_softrepa.softrepa.editing.methods import FLOW_EDIT
from softrepa_tests.sampling import noise, prompt
from softrepa_tests.tiny_models import CPU, build, compute_in, sdxl_vector

NAMES = ("source_positive", "source_negative", "target_positive", "target_negative")


def conds(family: str, **changed) -> dict:
    """The four prompts; `changed` replaces some."""
    return {name: prompt(family, name) for name in NAMES} | changed


def source_latent(family: str, batch: int = 1, size=(8, 8)) -> torch.Tensor:
    """A latent as a VAE gives it, before the model's own scaling."""
    return noise(family, batch, size, seed=77) * 3


def edit(
    model,
    family: str,
    latent=None,
    steps: int = 8,
    n_max: int = 6,
    n_min: int = 0,
    n_avg: int = 1,
    source_cfg: float = 2.0,
    target_cfg: float = 4.0,
    target_model=None,
    seed: int = 3,
    callback=None,
    scheduler: str = "normal",
    method=FLOW_EDIT,
    **prompts,
) -> torch.Tensor:
    """The edited samples, through the guider and sampler that the nodes use."""
    guider = FlowEditGuider(model, target_model)
    guider.set_conds(**conds(family, **prompts))
    guider.set_cfg(source_cfg, target_cfg)
    latent = {"samples": source_latent(family)} if latent is None else latent
    sigmas = edit_sigmas(model, scheduler, steps, n_max)
    return edit_latent(guider, FlowEditSampler(n_min, n_avg, method), sigmas, latent, seed, callback)["samples"]


def sd3_schedule(steps: int) -> np.ndarray:
    """The reference's schedule: a flow-matching Euler scheduler with shift 3, its smallest sigma shifted twice."""

    def shift(s):
        return 3 * s / (1 + 2 * s)

    times = np.linspace(1.0, shift(1 / 1000), steps)
    return np.append(shift(times), 0.0)


def vp_schedule(steps: int) -> np.ndarray:
    """Noise levels of Stable Diffusion at evenly spaced timesteps, as log sigma between whole timesteps."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    alphas = np.cumprod(1 - betas)
    log_sigmas = 0.5 * np.log((1 - alphas) / alphas)
    return np.append(np.exp(np.interp(np.linspace(999, 0, steps), np.arange(1000), log_sigmas)), 0.0)


class Network:
    """The tiny model's network in float64: guided flow velocities v(z_t, t)."""

    def __init__(self, family: str, v_prediction: bool = False):
        self.family, self.v_prediction = family, v_prediction
        self.model = build(family)
        self.net = self.model.model.diffusion_model.to(torch.float64)
        self.net.dtype = torch.float64
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
        alphas = np.cumprod(1 - betas)
        self.log_sigmas = 0.5 * np.log((1 - alphas) / alphas)

    def vector(self, cond, size):
        pooled = cond[0][1].get("pooled_output")
        if self.family == "sdxl":
            return sdxl_vector(pooled, size * 8.0).double()
        return None if pooled is None else pooled.double()

    def velocity(self, z, t, cond):
        """z_t = (1 - t) x + t n; v = n - x."""
        context = cond[0][0].double().expand(len(z), -1, -1)
        y = self.vector(cond, z.shape[-1])
        y = None if y is None else y.expand(len(z), -1)
        if self.family == "sd3":
            return self.net(z, torch.full((len(z),), t * 1000), context=context, y=y)
        sigma = t / (1 - t)
        timestep = np.abs(self.log_sigmas - np.log(sigma)).argmin()
        norm = (t**2 + (1 - t) ** 2) ** 0.5
        signal, level, scaled = (1 - t) / norm, t / norm, z / norm
        out = self.net(scaled, torch.full((len(z),), float(timestep)), context=context, y=y)
        if self.v_prediction:
            return (signal * out + level * scaled) - (signal * scaled - level * out)
        return out - (z - t * out) / (1 - t)

    def guided(self, z, t, positive, negative, scale):
        v = self.velocity(z, t, positive)
        if scale == 1:
            return v
        unconditional = self.velocity(z, t, negative)
        return unconditional + scale * (v - unconditional)


def in_double(cond):
    return cond.double() if torch.is_tensor(cond) and cond.is_floating_point() else cond


def norm_in_double(norm, x):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight=norm.scale.to(x) + 1.0, eps=norm.eps)


class Transformer(Network):
    """The same of a family whose sigma is the paper's t; what the network gets besides is ComfyUI's `extra_conds`."""

    def __init__(self, family: str):
        self.model = build(family)
        compute_in(self.model, torch.float64)

    def velocity(self, z, t, cond):
        base, (context, extra) = self.model.model, cond[0]
        found = base.extra_conds(cross_attn=context.double(), **extra, noise=z, device=CPU)
        given = {name: in_double(one.process_cond(batch_size=len(z)).cond) for name, one in found.items()}
        time = base.model_sampling.timestep(torch.full((len(z),), float(t), dtype=torch.float64))
        options = {"sample_sigmas": torch.tensor([1.0, 0.0]), "sigmas": torch.tensor([float(t)])}
        context = given.pop("c_crossattn")
        with (  # fused rotations have no float64, and one norm leaves it
            patch.object(comfy.model_management, "in_training", True),
            patch.object(comfy.quant_ops.ck, "rms_rope_split_half", rms_rope_split_half),
            patch.object(comfy.ldm.krea2.model.RMSNorm, "forward", norm_in_double),
        ):
            return base.diffusion_model(z, time, context=context, transformer_options=options, **given).double()


def paper_edit(
    network: Network, latent, draws: Draws, times, prompts, source_cfg, target_cfg, n_min=0, n_avg=1, mask=1.0
) -> torch.Tensor:
    """Algorithm 1 of arXiv 2412.08629 on the model's own scale of latents; `mask` is 0 or 1."""

    def source(z, t):
        return network.guided(z, t, prompts["source_positive"], prompts["source_negative"], source_cfg)

    def target(z, t):
        return network.guided(z, t, prompts["target_positive"], prompts["target_negative"], target_cfg)

    x = network.model.model.process_latent_in(latent.double())
    z, steps = x.clone(), len(times) - 1
    for i in range(steps - n_min):
        t, t_next = times[i], times[i + 1]
        change = 0
        for _ in range(n_avg):
            zs = (1 - t) * x + t * draws().double()
            zt = z + zs - x
            change = change + target(zt, t) - source(zs, t)
        z = z + mask * (t_next - t) * change / n_avg
    if n_min > 0:
        n, start = draws().double(), times[steps - n_min]
        z = z + (1 - start) * x + start * n - x
        for i in range(steps - n_min, steps):
            stepped = z + (times[i + 1] - times[i]) * target(z, times[i])
            z = mask * stepped + (1 - mask) * ((1 - times[i + 1]) * x + times[i + 1] * n)
    return network.model.model.process_latent_out(z)


def aligned_edit(network: Network, latent, draws: Draws, times, prompts, cfg, n_avg=1, mask=1.0) -> torch.Tensor:
    """FlowAlign (arXiv 2505.23145) as its public code steps, q of the source and p of the edit; `mask` is 0 or 1."""
    x = network.model.model.process_latent_in(latent.double())
    z = x.clone()
    for t, t_next in pairwise(times):
        step = 0
        for _ in range(n_avg):
            q = (1 - t) * x + t * draws().double()
            p = z + q - x
            v_p = network.guided(p, t, prompts["target_positive"], prompts["source_positive"], cfg)
            v_q = network.velocity(q, t, prompts["source_positive"])
            step = step + ((t_next - t) * (v_p - v_q) + 0.01 * (q - t * v_q - p + t * v_p)) / n_avg
        z = z + mask * step
    return network.model.model.process_latent_out(z)
