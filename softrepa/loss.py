"""The contrastive objective of SoftREPA (arXiv 2503.08250, section 3), on the matrix of denoising errors.

errors[i, j] is the mean squared denoising error of image i under caption j, (B, B), float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_SCALE = 4.0
TEMPERATURE = 0.07


def logits(errors: Tensor, temperature: float = TEMPERATURE, scale: float = LOGIT_SCALE) -> Tensor:
    """l_ij = S exp(-e_ij / tau)."""
    return scale * torch.exp(-errors / temperature)


def contrast(errors: Tensor, temperature: float = TEMPERATURE, scale: float = LOGIT_SCALE) -> Tensor:
    """cross_entropy(l_i, i) of each image, (B,)."""
    return F.cross_entropy(logits(errors, temperature, scale), _own(errors), reduction="none")


def contrastive_loss(
    errors: Tensor,
    temperature: float = TEMPERATURE,
    scale: float = LOGIT_SCALE,
    denoising_weight: float = 0.0,
) -> Tensor:
    """mean_i cross_entropy(l_i, i) + lambda mean_i e_ii."""
    return contrast(errors, temperature, scale).mean() + denoising_weight * errors.diagonal().mean()


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


def mutual_information(errors: Tensor, elements: int) -> float:
    """The mean of `information` over the images."""
    return information(errors, elements).mean().item()


def _own(errors: Tensor) -> Tensor:
    return torch.arange(len(errors), device=errors.device)
