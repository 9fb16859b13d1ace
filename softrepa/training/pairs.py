"""Image-caption pairs of one step, and the exact token gradient at the memory of a micro-batch (sections 1 and 5)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..data.dataset import Cond
from .ranks import ALONE, Ranks

Rows = Tensor
"""The rows of all layers at one timestep, (L, m, hidden width)."""

Aims = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`agsm.aims` with its constants."""

MOST_KEPT = 2**28
"""Bytes of pair gradients that are kept at a time: 2,000 pairs of SD3. It is fixed, so that sums come out the same."""


@dataclass(frozen=True)
class StepBatch:
    """What a step looks at: B images, one noise and one timestep for all of them, and J captions.

    latents: (B, C, H, W) as the network sees them; noise: (1, C, H, W); t: 0..999; compared: (B, J) bool, which pairs
    count; targets: (B, C, H, W) that predictions are compared with, where they are not those of the noise.
    """

    latents: Tensor
    noise: Tensor
    conds: list[Cond]
    t: int
    compared: Tensor
    targets: Tensor | None = None

    @classmethod
    def of_all(cls, latents: Tensor, noise: Tensor, conds: list[Cond], t: int) -> "StepBatch":
        """Every image compared with every caption."""
        return cls(latents, noise, conds, t, torch.ones(len(latents), len(conds), dtype=torch.bool))

    @property
    def pairs(self) -> int:
        return int(self.compared.sum())

    def parts(self, most: int) -> list["StepBatch"]:
        """The same pairs in batches of whole rows, each of at most `most` pairs or of one row."""
        masks: list[Tensor] = []
        for row in range(len(self.compared)):
            alone = torch.zeros_like(self.compared)
            alone[row] = self.compared[row]
            if masks and (masks[-1] | alone).sum() <= most:
                masks[-1] |= alone
            else:
                masks.append(alone)
        return [self.only(mask) for mask in masks]

    def only(self, compared: Tensor) -> "StepBatch":
        """The same images and captions, and of the pairs these."""
        return replace(self, compared=compared)


class Pairs(Protocol):
    """The frozen model on image-caption pairs, `micro_batch` of them at once (`softrepa/comfy/training/pairs.py`).

    Of a batch in which no pair is compared everything is 0.
    """

    def errors(self, rows: Rows, batch: StepBatch, micro_batch: int) -> Tensor:
        """(B, J) without gradients; 0 where pairs are not compared."""

    def gradients(self, rows: Rows, batch: StepBatch, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Errors, and each compared pair's gradient of its own error by the rows, (P, L, m, hidden width)."""

    def weighted_gradient(self, rows: Rows, batch: StepBatch, weights: Tensor, micro_batch: int) -> Tensor:
        """Sum of the pairs' gradients times `weights` (B, J), (L, m, hidden width)."""

    def regression(
        self, aims: Aims, banks: Tensor, teacher: Tensor, batch: StepBatch, weights: Tensor, micro_batch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of AGSM, in which each pair counts `weights` (B, J), errors (B, J), and the loss's gradient.

        The gradient is by `banks` (2, L, m, hidden width). Of an image all pairs are compared, or none.
        """

    def guided(self, rows: Rows, batch: StepBatch, empty: Cond, scale: float, micro_batch: int) -> Tensor:
        """What the model without the rows predicts at a guidance, v_u + scale (v_i - v_u), (B, C, H, W) float32.

        v_i is under the caption that image i is compared with, one at most, v_u under `empty`. 0 where there is none.
        """

    def embed(self, rows: Tensor) -> Tensor: ...


def backward_through_pairs(
    rows: Rows,
    pairs: Pairs,
    batch: StepBatch,
    micro_batch: int,
    objective: Callable[[Tensor], Tensor],
    is_by_row: bool = True,
    most_kept: int = MOST_KEPT,
    *,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """Adds d loss / d parameters to the parameters behind `rows`; returns the loss and the errors (B, J).

    dL/d rows = sum_ij W_ij g_ij with W = dL/dE and g_ij the gradient of a pair's own error: one forward and one
    backward a pair are enough, for W is known when the errors are. Where the loss is a mean over images of what their
    own rows of E give (`is_by_row`), that is after each row, so gradients of some rows are kept at a time. Where it is
    not, or a row has more of them than `most_kept` bytes, the errors are computed first, without gradients.

    Of several processes each computes its share of the pairs; all of them know W, and sum the gradients.
    """
    fixed = rows.detach()
    most = most_kept // (4 * fixed.numel())
    parts = batch.parts(most)
    if (is_by_row or len(parts) == 1) and all(part.pairs <= most for part in parts):
        errors, gradient = torch.zeros(batch.compared.shape), torch.zeros(fixed.shape, dtype=torch.float64)
        for part in parts:
            own = part.only(ranks.pairs(part.compared))
            found, gradients = pairs.gradients(fixed, own, micro_batch)
            errors = errors.to(found.dtype) + ranks.summed(found.detach())
            gradient += weighted_sum(loss_weights(errors, objective)[own.compared], gradients)
    else:
        own = batch.only(ranks.pairs(batch.compared))
        errors = ranks.summed(pairs.errors(fixed, own, micro_batch).detach())
        gradient = pairs.weighted_gradient(fixed, own, loss_weights(errors, objective), micro_batch)
    rows.backward(ranks.summed(gradient).to(rows))
    return objective(errors), errors


def weighted_sum(weights: Tensor, gradients: Tensor) -> Tensor:
    """sum_p w_p g_p of (P,) and (P, ...), in float64, on the CPU; summed there where the device has no float64."""
    device = torch.device("cpu") if gradients.device.type == "mps" else gradients.device
    total = torch.zeros(gradients.shape[1:], dtype=torch.float64, device=device)
    for weight, gradient in zip(weights.tolist(), gradients.detach().to(device), strict=True):
        total.add_(gradient, alpha=weight)
    return total.cpu()


def loss_weights(errors: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """W = dL/dE, (B, J)."""
    errors = errors.detach().requires_grad_()
    (weights,) = torch.autograd.grad(objective(errors), errors)
    return weights
