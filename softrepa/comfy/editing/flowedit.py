"""FlowEdit under ComfyUI: a guider that holds a source and a target prompt pair, and the sampler that edits.

Each pair becomes a pass with conds called positive and negative, as ComfyUI and its patches expect them: areas,
ControlNets and hooks of one pair never reach the other.
"""

from collections.abc import Callable
from functools import partial

import comfy.model_management as memory
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, Sampler, process_conds
from torch import Tensor
from tqdm.auto import tqdm

from ...editing.flowedit import Draws, flow_edit
from ...editing.methods import FLOW_EDIT, Method
from ...errors import SoftREPAError
from . import checks as checks
from .passes import ROLES, Pass, stack_of


class FlowEditGuider(CFGGuider):
    """Guidance for an edit: a source and a target pair of conds, each with its scale, on one model or two.

    Which of them predict what is up to the method of the sampler. Raises SoftREPAError for models, latents, conds and
    sigmas that do not fit, before anything is loaded.
    """

    conds: dict[str, list[dict]]

    def __init__(self, model: ModelPatcher, target_model: ModelPatcher | None = None):
        checks.check_model(model)
        super().__init__(model)
        self.target_guider = None
        if target_model is not None and target_model is not model:
            checks.check_target_model(model, target_model)
            self.target_guider = CFGGuider(target_model)

    def set_conds(self, source_positive, source_negative, target_positive, target_negative):
        source = {"source_positive": source_positive, "source_negative": source_negative}
        target = {"target_positive": target_positive, "target_negative": target_negative}
        self.prompts = source | target
        self.inner_set_conds(self.prompts if self.target_guider is None else source)

    def set_cfg(self, source_cfg: float, target_cfg: float):
        checks.check_guidance(source_cfg, target_cfg)
        self.source_cfg, self.target_cfg = source_cfg, target_cfg
        self.cfg = target_cfg

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None
    ):
        """The edited latent; where `denoise_mask` is 0 it is `latent_image` bit for bit."""
        if not isinstance(sampler, FlowEditSampler):
            raise SoftREPAError(
                f"sampler is {type(sampler).__name__} beside the FlowEdit Guider, expected the FlowEdit Sampler."
            )
        if len(sigmas) == 0:  # a scheduler with denoise 0: nothing to run
            return latent_image
        for guider in (self, self.target_guider):
            if guider is not None:
                checks.check_latent(latent_image, guider.model_patcher)
        checks.check_mask(denoise_mask)
        if self.target_guider is not None:
            self.target_guider.set_conds(*(self.prompts[name] for name in sampler.method.target))
        checks.check_conds(self._conds_by_input(sampler.method), len(latent_image))
        checks.check_noise(noise)
        checks.check_sigmas(sigmas, sampler.n_min)
        denoise_mask = mask_of_stills(denoise_mask, latent_image)
        edited = super().sample(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
        if denoise_mask is None:
            return edited
        device = self.model_patcher.load_device
        mask = comfy.sampler_helpers.prepare_mask(denoise_mask, latent_image.shape, device).to(edited.device)
        # the model's own scaling of latents, there and back, is not exact
        return torch.where(mask == 0, latent_image.to(edited), edited)

    def inner_sample(
        self, noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **rest
    ):
        every = self.conds
        self.conds = pair_of(every, sampler.method.source)
        self.source_latent = latent_image
        if self.target_guider is None:
            pair = pair_of(every, sampler.method.target)
            latent = self.inner_model.process_latent_in(latent_image)
            self.target_conds = process_conds(self.inner_model, noise, pair, device, latent, denoise_mask, seed, **rest)
        try:
            return super().inner_sample(
                noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **rest
            )
        finally:
            self.conds = every  # ComfyUI cleans up the ControlNets it finds in them
            self.source_latent = self.target_conds = None

    def _conds_by_input(self, method: Method) -> dict[str, list[dict]]:
        if self.target_guider is None:
            return self.original_conds
        pair = self.target_guider.original_conds
        return self.original_conds | {name: pair[role] for role, name in zip(ROLES, method.target, strict=True)}


def pair_of(conds: dict[str, list[dict]], names: tuple[str, str]) -> dict[str, list[dict]]:
    """The prompts of these names by role; ComfyUI processes copies."""
    return {role: conds[name] for role, name in zip(ROLES, names, strict=True)}


class FlowEditSampler(Sampler):
    """Edits the latent that a `FlowEditGuider` is given, along the sigmas it is given."""

    def __init__(self, n_min: int = 0, n_avg: int = 1, method: Method = FLOW_EDIT):
        checks.check_method(method, n_min)
        self.n_min, self.n_avg, self.method = n_min, n_avg, method

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        if not isinstance(model_wrap, FlowEditGuider):
            raise SoftREPAError(
                f"guider is {type(model_wrap).__name__} beside the FlowEdit Sampler, expected the FlowEdit Guider."
            )
        source_cfg = model_wrap.source_cfg if self.method.source_cfg is None else self.method.source_cfg
        source = Pass(model_wrap, model_wrap.conds, source_cfg, extra_args)
        edit = partial(self._edit, source, sigmas, callback, noise, latent_image, denoise_mask, disable_pbar)
        if model_wrap.target_guider is None:
            return edit(Pass(model_wrap, model_wrap.target_conds, model_wrap.target_cfg, extra_args))
        within = WithinTarget(edit, model_wrap.target_cfg)
        mask = None if denoise_mask is None else denoise_mask[:, :1]
        seed = extra_args.get("seed")
        model_wrap.target_guider.sample(noise, model_wrap.source_latent, within, sigmas, mask, None, True, seed)
        return within.samples

    def _edit(self, source: Pass, sigmas, callback, noise, latent, mask, disable_pbar, target: Pass) -> Tensor:
        total = len(sigmas) - 1
        with tqdm(total=total, disable=disable_pbar) as bar:

            def on_step(step: int, estimate: Tensor, zt: Tensor) -> None:
                if callback is not None:
                    callback(step, estimate, zt, total)
                bar.update()

            return flow_edit(
                latent,
                sigmas,
                Passes(source, target, noise.shape, self.method),
                Draws(noise),
                # Without ComfyUI's max_denoise, which is meant for empty latents: X is really there under the noise.
                source.inner_model.model_sampling.noise_scaling,
                self.n_min,
                self.n_avg,
                None if mask is None else partial(mask_at, source, sigmas, mask),
                on_step,
                self.method.zeta,
            )


class WithinTarget(Sampler):
    """Runs the edit inside the sampling of the target's own model, when that model and its conds are prepared."""

    def __init__(self, edit: Callable[[Pass], Tensor], cfg: float):
        self.edit, self.cfg = edit, cfg

    def sample(self, model_wrap, sigmas, extra_args, *_, **__):
        self.samples = self.edit(Pass(model_wrap, model_wrap.conds, self.cfg, extra_args))
        return self.samples


class Passes:
    """`softrepa.editing.flowedit.Denoiser` by a source and a target pass."""

    def __init__(self, source: Pass, target: Pass, shape: torch.Size, method: Method):
        self.source, self.target_pass, self.shape = source, target, shape
        self.stack = stack_of(source, target, shape[0], method)
        one, other = source.model_patcher, target.model_patcher
        # Two MODELs made from one checkpoint share its weights, patched for one of them at a time.
        self.takes_turns = one is not other and one.is_clone(other)
        if one is not other and not self.takes_turns:
            load(shape, source, target)

    def both(self, zs: Tensor, zt: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        memory.throw_exception_if_processing_interrupted()
        if self.stack is not None and self.stack.fits(zs):
            return self.stack.both(zs, zt, sigma)
        return self._denoise(self.source, zs, sigma), self._denoise(self.target_pass, zt, sigma)

    def target(self, zt: Tensor, sigma: Tensor) -> Tensor:
        memory.throw_exception_if_processing_interrupted()
        return self._denoise(self.target_pass, zt, sigma)

    def _denoise(self, one: Pass, x: Tensor, sigma: Tensor) -> Tensor:
        if self.takes_turns and one.inner_model.current_patcher is not one.model_patcher:
            (self.target_pass if one is self.source else self.source).model_patcher.unpatch_hooks()
            load(self.shape, one)
            one.inner_model.current_patcher = one.model_patcher
        return one.denoise(x, sigma)


def load(shape: torch.Size, *passes: Pass) -> None:
    """Brings the models of `passes`, with what their conds need, to the device together."""
    models = [model for one in passes for model in (one.model_patcher, *one.loaded_models)]
    needs = [comfy.sampler_helpers.estimate_memory(one.model_patcher, shape, one.conds) for one in passes]
    most, least = (max(values) for values in zip(*needs, strict=True))
    memory.load_models_gpu(models, memory_required=most, minimum_memory_required=least)


def mask_of_stills(mask: Tensor | None, latent: Tensor) -> Tensor | None:
    """A noise mask with the axes of the latent: ComfyUI takes several masks for the frames of one video."""
    if mask is None or latent.ndim == 4 or mask.ndim == latent.ndim:
        return mask
    return mask.reshape(-1, 1, 1, *mask.shape[-2:])


def mask_at(source: Pass, sigmas: Tensor, mask: Tensor, sigma: Tensor) -> Tensor:
    """The noise mask (B, C, ...) at one sigma; Differential Diffusion makes it grow along the way."""
    change = source.model_options.get("denoise_mask_function")
    if change is None:
        return mask
    return change(sigma * mask.new_ones(len(mask)), mask, extra_options={"model": source, "sigmas": sigmas})


def edit_latent(
    guider: FlowEditGuider, sampler: FlowEditSampler, sigmas: Tensor, latent: dict, seed: int, callback=None
) -> dict:
    """A LATENT edited as a KSampler would sample it: noise by seed and batch index, mask, device and dtype."""
    samples = comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"])
    checks.check_latent(samples, guider.model_patcher)
    generator = torch.Generator().manual_seed(seed)
    noise = comfy.sample.prepare_noise_inner(samples, generator, latent.get("batch_index"))
    edited = guider.sample(
        noise,
        samples,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio_")}
    out["samples"] = edited.to(memory.intermediate_device(), samples.dtype)
    return out


def edit_sigmas(model: ModelPatcher, scheduler: str, steps: int, n_max: int) -> Tensor:
    """The last n_max steps of a schedule of `steps`."""
    sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, scheduler, steps)[-(n_max + 1) :]
