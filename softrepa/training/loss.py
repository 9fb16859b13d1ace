"""The contrastive objective of SoftREPA (arXiv 2503.08250, section 3), on the matrix of denoising errors.

errors[i, j] is the mean squared denoising error of image i under caption j, (B, B), float32. Further columns, (B, J),
are captions that only some of the images are compared with: `compared` (B, J) says which.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_SCALE = 4.0
TEMPERATURE = 0.07


def logits(errors: Tensor, temperature: float | Tensor = TEMPERATURE, scale: float = LOGIT_SCALE) -> Tensor:
    """l_ij = S exp(-e_ij / tau)."""
    return scale * torch.exp(-errors / temperature)


def contrast(
    errors: Tensor,
    temperature: float | Tensor = TEMPERATURE,
    scale: float = LOGIT_SCALE,
    compared: Tensor | None = None,
) -> Tensor:
    """cross_entropy(l_i, i) of each image among the captions it is compared with, (B,)."""
    scores = logits(errors, temperature, scale)
    if compared is not None:
        scores = scores.masked_fill(~compared.to(scores.device), -torch.inf)
    return F.cross_entropy(scores, _own(errors), reduction="none")


def contrastive_loss(
    errors: Tensor,
    temperature: float = TEMPERATURE,
    scale: float = LOGIT_SCALE,
    denoising_weight: float = 0.0,
    relative: bool = False,
    symmetric: bool = False,
    compared: Tensor | None = None,
) -> Tensor:
    """mean_i cross_entropy(l_i, i) + lambda mean_i e_ii; the rest is not the paper's.

    relative: tau is `temperature` times the batch's mean error in the batch, a constant to the gradient. A batch has
    one timestep, so that is a tau(t): exp(-e / tau) then dies out at none.
    symmetric: the mean of this cross-entropy and that of each caption among the images.
    """
    in_batch = errors[:, : len(errors)]
    tau = temperature * in_batch.detach().mean() if relative else temperature
    value = contrast(errors, tau, scale, compared).mean()
    if symmetric:
        value = (value + contrast(in_batch.T, tau, scale).mean()) / 2
    return value + denoising_weight * denoising_loss(errors)


def denoising_loss(errors: Tensor) -> Tensor:
    """mean_i e_ii."""
    return errors.diagonal().mean()


def comparison(wrong: Sequence[int]) -> Tensor:
    """Which captions each of B images is compared with, (B, J): all B of the batch, then its own wrong[i] more."""
    own = torch.block_diag(*(torch.ones(1, count) for count in wrong)).bool()
    return torch.cat([torch.ones(len(wrong), len(wrong), dtype=torch.bool), own], dim=1)


def retrieved(errors: Tensor) -> Tensor:
    """Whether each image's own caption has the smallest error, (B,)."""
    return errors.argmin(dim=1) == _own(errors)


def retrieval_accuracy(errors: Tensor) -> float:
    """Share of images whose own caption has the smallest error."""
    return retrieved(errors).float().mean().item()


def information(errors: Tensor, elements: int) -> Tensor:
    """Equation 20 at one timestep, unweighted, image by image: log N + log softmax_j(-elements e_ij / 2)_i, in nats."""
    scores = torch.log_softmax(-elements * errors.double() / 2, dim=1).diagonal()
    return torch.log(torch.tensor(float(len(errors)))) + scores


def _own(errors: Tensor) -> Tensor:
    return torch.arange(len(errors), device=errors.device)
