"""The contrastive objective of SoftREPA (arXiv 2503.08250, section 3), on the matrix of denoising errors.

errors[i, j] is the mean squared denoising error of image i under caption j, (B, B), float32. Further columns, (B, J),
are captions that only some of the images are compared with: `compared` (B, J) says which.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

CROSS_ENTROPY, RANKING = "cross-entropy", "ranking"
CONTRASTS = (CROSS_ENTROPY, RANKING)
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


def soft_rank(errors: Tensor, temperature: float | Tensor = TEMPERATURE, compared: Tensor | None = None) -> Tensor:
    """The share of the other captions that fit an image better than its own, softly, (B,), 0 to 1.

    mean_j sigmoid((e_ii - e_ij) / tau) over the j != i that it is compared with; ranks by sigmoids of differences are
    those of Smooth-AP (arXiv 2007.12163).
    """
    others = torch.ones_like(errors, dtype=torch.bool) if compared is None else compared.to(errors.device, copy=True)
    others.fill_diagonal_(False)
    better = torch.sigmoid((errors.diagonal().unsqueeze(1) - errors) / temperature)
    return (better * others).sum(dim=1) / others.sum(dim=1).clamp(min=1)


def contrastive_loss(
    errors: Tensor,
    temperature: float = TEMPERATURE,
    scale: float = LOGIT_SCALE,
    denoising_weight: float = 0.0,
    relative: bool = False,
    symmetric: bool = False,
    compared: Tensor | None = None,
    shared: int | None = None,
    kind: str = CROSS_ENTROPY,
) -> Tensor:
    """mean_i cross_entropy(l_i, i) + lambda mean_i e_ii; the rest is not the paper's.

    relative: tau is `temperature` times the mean error of what is compared among the first `shared` captions, those of
    the batch where it is not given; a constant to the gradient. A batch has one timestep, so that is a tau(t):
    exp(-e / tau) then dies out at none.
    symmetric: the mean of this cross-entropy and that of each caption among the images.
    kind: "ranking" is `soft_rank` instead of the cross-entropy, and has no `scale`.
    """
    tau = temperature * mean_error(errors.detach(), compared, shared) if relative else temperature
    of_each = soft_rank if kind == RANKING else partial(contrast, scale=scale)
    value = of_each(errors, tau, compared=compared).mean()
    if symmetric:
        value = (value + of_each(errors[:, : len(errors)].T, tau).mean()) / 2
    return value + denoising_weight * denoising_loss(errors)


def mean_error(errors: Tensor, compared: Tensor | None, shared: int | None) -> Tensor:
    """Of the pairs that are compared among the first `shared` captions."""
    among = errors[:, : shared or len(errors)]
    mask = None if compared is None else compared[:, : among.shape[1]].to(among.device)
    return among.mean() if mask is None or mask.all() else among[mask].mean()


def denoising_loss(errors: Tensor) -> Tensor:
    """mean_i e_ii."""
    return errors.diagonal().mean()


def comparison(
    wrong: Sequence[int], shared: int | None = None, negatives: int = 0, order: Tensor | None = None
) -> Tensor:
    """Which captions each of B images is compared with, (B, J).

    The first `shared` captions, B where it is not given, are for all images: an image has its own and all the others,
    or `negatives` of these where there are more. Behind them are wrong[i] of each image alone.
    order: a permutation of the B images. Each is compared with its own caption and those of the next ones in it, so all
    captions are used equally often.
    """
    images = len(wrong)
    shared = shared or images
    among = torch.ones(images, shared, dtype=torch.bool)
    if 0 < negatives < shared - 1:
        assert order is not None
        among = torch.zeros_like(among)
        for shift in range(negatives + 1):
            among[order, order.roll(-shift)] = True
    own = torch.block_diag(*(torch.ones(1, count) for count in wrong)).bool()
    return torch.cat([among, own], dim=1)


def retrieved(errors: Tensor) -> Tensor:
    """Whether each image's own caption has the smallest error, (B,)."""
    return errors.argmin(dim=1) == _own(errors)


def retrieval_accuracy(errors: Tensor, compared: Tensor | None = None) -> float:
    """Share of images whose own caption has the smallest error, of those that are `compared` where that is given."""
    if compared is not None:
        errors = errors.masked_fill(~compared.to(errors.device), torch.inf)
    return retrieved(errors).float().mean().item()


def information(errors: Tensor, elements: int) -> Tensor:
    """Equation 20 at one timestep, unweighted, image by image: log N + log softmax_j(-elements e_ij / 2)_i, in nats."""
    scores = torch.log_softmax(-elements * errors.double() / 2, dim=1).diagonal()
    return torch.log(torch.tensor(float(len(errors)))) + scores


def _own(errors: Tensor) -> Tensor:
    return torch.arange(len(errors), device=errors.device)
