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

    def matching(self) -> "StepBatch":
        """Each image with its own caption alone: the first B are the images' own."""
        images = len(self.latents)
        return replace(self, conds=self.conds[:images], compared=torch.eye(images, dtype=torch.bool))

    def under(self, cond: Cond) -> "StepBatch":
        """The images that are compared with anything, each under this caption alone."""
        return replace(self, conds=[cond], compared=self.compared.any(dim=1, keepdim=True))


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

    def gradients_and_predictions(
        self, rows: Rows, batch: StepBatch, micro_batch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `gradients`, and what the model predicts of each compared pair, (P, C, H, W) float32 on the CPU."""

    def unconditional(self, rows: Rows, batch: StepBatch, empty: Cond, micro_batch: int) -> tuple[Tensor, Tensor]:
        """What the model with the rows predicts of each image under `empty`, and its target; (B, C, H, W), on the CPU.

        The prediction is 0 where an image is compared with nothing.
        """

    def through_unconditional(
        self, rows: Rows, batch: StepBatch, empty: Cond, pulls: Tensor, micro_batch: int
    ) -> Tensor:
        """The gradient by the rows of these predictions' products with `pulls` (B, C, H, W), (L, m, hidden width)."""

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


@dataclass(frozen=True)
class Guidance:
    """Predictions as in sampling with guidance, v_u + scale (v_j - v_u) (arXiv 2207.12598), v_u under `empty`.

    Errors are theirs or, with `is_learned`, those of plain predictions beside them.
    """

    empty: Cond
    scale: float
    is_learned: bool = False


class Plain:
    """Errors of pairs at fixed rows, and gradients of a loss on them."""

    def __init__(self, pairs: Pairs, rows: Rows, micro_batch: int):
        self.pairs, self.rows, self.micro_batch = pairs, rows, micro_batch

    def kept_bytes(self, batch: StepBatch) -> int:
        """Of a pair, until the weights of its loss are known."""
        return 4 * self.rows.numel()

    def share(self, batch: StepBatch, ranks: Ranks) -> StepBatch:
        """What this process computes of a batch."""
        return batch.only(ranks.pairs(batch.compared))

    def errors(self, batch: StepBatch) -> Tensor:
        """(B, J)."""
        return self.pairs.errors(self.rows, batch, self.micro_batch)

    def gradients(self, batch: StepBatch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Errors (B, J), and what gives the loss's gradient for its weights (B, J), (L, m, hidden width)."""
        errors, gradients = self.pairs.gradients(self.rows, batch, self.micro_batch)
        return errors, lambda weights: weighted_sum(weights[batch.compared], gradients)

    def weighted_gradient(self, batch: StepBatch, weights: Tensor, most: int) -> Tensor:
        """The loss's gradient for its weights (B, J), while at most `most` pairs are kept."""
        return self.pairs.weighted_gradient(self.rows, batch, weights, self.micro_batch)


class Learned(Plain):
    """Errors beside what the model without the rows predicts at a guidance, computed for this process's share alone."""

    def __init__(self, pairs: Pairs, rows: Rows, micro_batch: int, guidance: Guidance):
        super().__init__(pairs, rows, micro_batch)
        self.guidance = guidance

    def errors(self, batch: StepBatch) -> Tensor:
        return super().errors(self._aimed(batch))

    def gradients(self, batch: StepBatch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return super().gradients(self._aimed(batch))

    def weighted_gradient(self, batch: StepBatch, weights: Tensor, most: int) -> Tensor:
        return super().weighted_gradient(self._aimed(batch), weights, most)

    def _aimed(self, batch: StepBatch) -> StepBatch:
        empty, scale = self.guidance.empty, self.guidance.scale
        return replace(batch, targets=self.pairs.guided(self.rows, batch, empty, scale, self.micro_batch))


class Guided(Plain):
    """The same of guided predictions; the rows act on both halves, as in sampling.

    An error is that of v_u + s (v_j - v_u) - target = s (v_j - aim) =: r_j with aim = v_u + (target - v_u) / s, so s^2
    times that of v_j beside the aim, and so is its gradient through v_j. The gradient through v_u is one for all
    captions of an image: v_u is pulled by (1 - s) sum_j W_j 2 r_j / N, of N = C H W numbers.
    """

    def __init__(self, pairs: Pairs, rows: Rows, micro_batch: int, guidance: Guidance):
        super().__init__(pairs, rows, micro_batch)
        self.empty, self.scale = guidance.empty, guidance.scale

    def kept_bytes(self, batch: StepBatch) -> int:
        return super().kept_bytes(batch) + 4 * batch.latents[0].numel()

    def share(self, batch: StepBatch, ranks: Ranks) -> StepBatch:
        """Whole images: then v_u is computed once, and what pulls it is one sum."""
        return batch.only(ranks.images(batch.compared))

    def errors(self, batch: StepBatch) -> Tensor:
        return self.scale**2 * super().errors(self._aimed(batch))

    def gradients(self, batch: StepBatch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        batch = self._aimed(batch)
        errors, gradients, predictions = self.pairs.gradients_and_predictions(self.rows, batch, self.micro_batch)
        return self.scale**2 * errors, lambda weights: self._through_both(batch, weights, gradients, predictions)

    def weighted_gradient(self, batch: StepBatch, weights: Tensor, most: int) -> Tensor:
        total = torch.zeros(self.rows.shape, dtype=torch.float64)
        for part in batch.parts(most):
            total += self.gradients(part)[1](weights)
        return total

    def _aimed(self, batch: StepBatch) -> StepBatch:
        unconditional, targets = self.pairs.unconditional(self.rows, batch, self.empty, self.micro_batch)
        return replace(batch, targets=unconditional + (targets - unconditional) / self.scale)

    def _through_both(self, batch: StepBatch, weights: Tensor, gradients: Tensor, predictions: Tensor) -> Tensor:
        assert batch.targets is not None
        images, _ = batch.compared.nonzero(as_tuple=True)
        of_pairs = weights[batch.compared]
        residuals = self.scale * (predictions - batch.targets[images])
        factors = (1 - self.scale) * 2 / batch.latents[0].numel() * of_pairs.to(residuals)
        pulls = torch.zeros_like(batch.targets, dtype=residuals.dtype)
        pulls.index_add_(0, images, torch.einsum("p,p...->p...", factors, residuals))
        through = self.pairs.through_unconditional(self.rows, batch, self.empty, pulls, self.micro_batch)
        return self.scale**2 * weighted_sum(of_pairs, gradients) + through


def errors_of(pairs: Pairs, rows: Rows, micro_batch: int, guidance: Guidance | None) -> Plain:
    """Guided or not; at scale 1 guidance is none."""
    if guidance is not None and guidance.is_learned:
        return Learned(pairs, rows, micro_batch, guidance)
    if guidance is None or guidance.scale == 1:
        return Plain(pairs, rows, micro_batch)
    return Guided(pairs, rows, micro_batch, guidance)


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
    guidance: Guidance | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds d loss / d parameters to the parameters behind `rows`; returns the loss and the errors (B, J).

    dL/d rows = sum_ij W_ij g_ij with W = dL/dE and g_ij the gradient of a pair's own error: one forward and one
    backward a pair are enough, for W is known when the errors are. Where the loss is a mean over images of what their
    own rows of E give (`is_by_row`), that is after each row, so gradients of some rows are kept at a time. Where it is
    not, or a row has more of them than `most_kept` bytes, the errors are computed first, without gradients.

    Of several processes each computes its share of the pairs; all of them know W, and sum the gradients.
    """
    fixed = rows.detach()
    way = errors_of(pairs, fixed, micro_batch, guidance)
    most = most_kept // way.kept_bytes(batch)
    parts = batch.parts(most)
    if (is_by_row or len(parts) == 1) and all(part.pairs <= most for part in parts):
        errors, gradient = torch.zeros(batch.compared.shape), torch.zeros(fixed.shape, dtype=torch.float64)
        for part in parts:
            found, weighted = way.gradients(way.share(part, ranks))
            errors = errors.to(found.dtype) + ranks.summed(found.detach())
            gradient += weighted(loss_weights(errors, objective))
    else:
        own = way.share(batch, ranks)
        errors = ranks.summed(way.errors(own).detach())
        gradient = way.weighted_gradient(own, loss_weights(errors, objective), most)
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
