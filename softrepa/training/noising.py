"""What the network sees of a noised image, and what its raw output is compared with (section 3 of arXiv 2503.08250).

sigma is the noise level as ComfyUI has it: for flow models 0 (no noise) to 1 (nothing else), for eps models the noise's
standard deviation over the image's, 0.03 to 14.6 for SD1.5.
"""

import torch
from torch import Tensor


def noised_flow(latents: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Flow models: x_t = (1 - sigma) x + sigma eps, target eps - x."""
    return (1 - sigma) * latents + sigma * noise, noise - latents


def noised_eps(latents: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Eps models: x_t = sqrt(abar) x + sqrt(1 - abar) eps with abar = 1 / (1 + sigma^2), target eps."""
    abar = 1 / (1 + sigma**2)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise, noise.expand_as(latents)


def pair_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample over (C, H, W), float32: (P, C, H, W) -> (P,)."""
    return (output.float() - target.float()).square().flatten(1).mean(dim=1)


FIRST, LAST = 0, 999
"""The timesteps there are, from no noise to nothing else."""


def draw_timestep(generator: torch.Generator, low: int = FIRST, high: int = LAST) -> int:
    """Uniform over low..high."""
    return int(torch.randint(low, high + 1, (), generator=generator))
