"""Noise and time, whatever ComfyUI calls the kind of model: how a latent is noised, and t as token files count it."""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from comfy.model_base import ModelType
from comfy.model_sampling import CONST, ModelSamplingDiscrete, ModelSamplingDiscreteEDM
from torch import Tensor

from ...training.noising import noised_eps, noised_flow

Noising = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Latents, noise and sigma -> what the network sees, and what its raw output is compared with."""

NOISINGS: Mapping[ModelType, Noising] = {
    ModelType.EPS: noised_eps,
    ModelType.FLOW: noised_flow,
    ModelType.FLUX: noised_flow,
}
"""By what the network predicts, for the adapters to choose from."""


def sigma_at(model_sampling, t: int) -> Tensor:
    """The noise level (), on the CPU, at t of 0..999.

    Flow models have t / 1000: ComfyUI's own sigma(t) would apply the sampling shift.
    """
    if isinstance(model_sampling, CONST):
        return torch.tensor(t / 1000)
    return model_sampling.sigmas[t].clone().cpu()  # a copy has no inference mark


def timestep(model_sampling, sigma: Tensor) -> Tensor:
    """t of 0..1000, by which a time table is read, at sigma (B,).

    The network's own t of some flow models ends at 1, and that of EDM's samplings, continuous or not, is a logarithm:
    there t is where the family's schedule has this sigma.
    """
    if isinstance(model_sampling, CONST):
        return sigma * 1000
    has_own = isinstance(model_sampling, ModelSamplingDiscrete) and not isinstance(
        model_sampling, ModelSamplingDiscreteEDM
    )
    return (model_sampling if has_own else usual_schedule()).timestep(sigma)


@cache
def usual_schedule() -> ModelSamplingDiscrete:
    """That of SD1.5 and SDXL."""
    with torch.inference_mode(False):
        return ModelSamplingDiscrete()


HALVINGS, DIGITS = 24, 6
"""A share of the sampling is found to 2^-25; sigmas in float32 tell no more than six digits of it."""


def percent(model_sampling, sigma: Tensor) -> float:
    """The share of the sampling at sigma (): the inverse of ComfyUI's `percent_to_sigma`, which falls.

    0 and 1 outside of the model's noise levels.
    """
    level = float(sigma)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if model_sampling.percent_to_sigma(middle) > level:
            low = middle
        else:
            high = middle
    return round((low + high) / 2, DIGITS)
