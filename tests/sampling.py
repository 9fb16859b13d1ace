"""Real sampling through ComfyUI with a sampler that only records what the network returns."""

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from softrepa_tests.tiny_models import LENGTH, POOLED, WIDTH, latent_shape, seeded


class Record(comfy.samplers.Sampler):
    """Calls the guided model once a sigma and keeps its answers; x stays what it was."""

    def __init__(self):
        self.denoised = []

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *_):
        for sigma in sigmas[:-1]:
            self.denoised.append(model_wrap(noise, sigma.expand(len(noise)), **extra_args))
        return self.denoised[-1]


def prompt(family: str, name: str, batch: int = 1, length: int | None = None) -> list:
    """A CONDITIONING with seeded values."""
    context = seeded((batch, length or LENGTH.get(family, 9), WIDTH[family]), f"{family}/{name}", 1.0)
    pooled = POOLED.get(family)
    extra = {"pooled_output": seeded((batch, pooled), f"{family}/{name}/pooled", 1.0)} if pooled else {}
    return [[context, extra]]


def noise(family: str, batch: int = 1, size: tuple[int, int] = (8, 8), seed: int = 0) -> torch.Tensor:
    return torch.randn((batch, *latent_shape(family, size)), generator=torch.Generator().manual_seed(seed))


def guider(model: ModelPatcher, family: str, cfg: float = 4.0, positive=None, negative=None):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or prompt(family, "positive"), negative or prompt(family, "negative"))
    guider.set_cfg(cfg)
    return guider


def sigmas_of(model: ModelPatcher, steps: int) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


def record(guider, x: torch.Tensor, sigmas: torch.Tensor) -> list[torch.Tensor]:
    """The guided denoised predictions at every sigma but the last, for the same x."""
    sampler = Record()
    guider.sample(x, torch.zeros_like(x), sampler, sigmas, disable_pbar=True, seed=0)
    return sampler.denoised


def sample(model: ModelPatcher, family: str, steps: int = 4, x: torch.Tensor | None = None, **conds) -> torch.Tensor:
    """A latent by plain Euler sampling."""
    x = noise(family) if x is None else x
    euler = comfy.samplers.sampler_object("euler")
    return guider(model, family, **conds).sample(
        x, torch.zeros_like(x), euler, sigmas_of(model, steps), disable_pbar=True, seed=0
    )


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()
