"""FlowEdit: editing a real image without inversion (arXiv 2412.08629, Algorithm 1), in denoised predictions.

The paper moves Z = X + E along the difference of two velocities, Z += (sigma' - sigma)(v_target - v_source).
With v = (z - D)/sigma this is E <- (sigma'/sigma) E + (1 - sigma'/sigma)(D_target - D_source), a line that holds
for flow models and, in variance-exploding coordinates, for eps and v models alike.

FlowAlign (arXiv 2505.23145) takes the same step and adds zeta (D_source - D_target) to Z, in its code
zeta (q - sigma v_q - p + sigma v_p) with zeta 0.01. Its target is guided away from the source prompt, where FlowEdit
has a negative one, and its source is not guided: that is up to the `Denoiser`.
"""

import hashlib
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor


class Denoiser(Protocol):
    """Guided denoised predictions D at noise level sigma, of latents (B, C, H, W) or of any other shape (B, ...)."""

    def both(self, zs: Tensor, zt: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """D of zs under the source prompt and D of zt under the target prompt."""

    def target(self, zt: Tensor, sigma: Tensor) -> Tensor:
        """D of zt under the target prompt."""


def flow_edit(
    source: Tensor,
    sigmas: Tensor,
    denoiser: Denoiser,
    draw: Callable[[], Tensor],
    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor],
    n_min: int = 0,
    n_avg: int = 1,
    mask_at: Callable[[Tensor], Tensor] | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    zeta: float = 0.0,
) -> Tensor:
    """The edited latent of `source` (B, ...), by one step for every pair of `sigmas`, the last of which is 0.

    draw: fresh standard normal noise of the source's shape; add_noise(sigma, noise, x): x at noise level sigma.
    n_min: how many of the last steps sample the target plainly, from one draw; n_avg: draws a step before them.
    mask_at(sigma): weight of the edit, 0 to 1; on_step(step, estimate of the result, zt).
    zeta: FlowAlign's pull back to the source in every step; FlowEdit has none.
    """
    edit = torch.zeros_like(source)
    first_plain = len(sigmas) - 1 - n_min
    noise = None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if step < first_plain:
            change = torch.zeros_like(source)
            for _ in range(n_avg):
                zs = add_noise(sigma, draw(), source)
                zt = zs + edit
                d_source, d_target = denoiser.both(zs, zt, sigma)
                change += (d_target - d_source) / n_avg
        else:
            # Euler on zt, with the source's own path for this noise subtracted: the same update, D_source = X
            noise = draw() if noise is None else noise
            zt = add_noise(sigma, noise, source) + edit
            change = denoiser.target(zt, sigma) - source
        if mask_at is not None:
            change = mask_at(sigma) * change
        kept = sigma_next / sigma
        back = pull(zeta, sigma_next, add_noise) if zeta else 0
        edit = kept * edit + (1 - kept - back) * change
        if on_step is not None:
            on_step(step, source + (1 - zeta) * change, zt)
    return source + edit


def pull(zeta: float, sigma: Tensor, add_noise: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """zeta for E at noise level sigma, which is signal + sigma times what it is in a flow model.

    That is 1 for flow models, and 1 + sigma for eps and v models.
    """
    signal = add_noise(sigma, torch.zeros_like(sigma), torch.ones_like(sigma))
    return zeta * (signal + sigma)


class Draws:
    """Standard normal noise, draw after draw: first the noise given, (B, C, H, W), then fresh values.

    Every image continues with a generator of its own, seeded from its own first noise: what an image gets does not
    depend on the images beside it, so one image of a batch can be done again alone.
    """

    def __init__(self, first: Tensor):
        self.first: Tensor | None = first
        self.like = first
        self.generators = [self._generator(rows) for rows in first.float().cpu()]

    def __call__(self) -> Tensor:
        if self.first is not None:
            first, self.first = self.first, None
            return first
        shape = self.like.shape[1:]
        rows = [torch.randn(shape, generator=generator) for generator in self.generators]
        return torch.stack(rows).to(self.like)

    @staticmethod
    def _generator(rows: Tensor) -> torch.Generator:
        digest = hashlib.sha256(rows.contiguous().numpy().tobytes()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
