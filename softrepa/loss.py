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


def contrastive_loss(
    errors: Tensor,
    temperature: float = TEMPERATURE,
    scale: float = LOGIT_SCALE,
    denoising_weight: float = 0.0,
) -> Tensor:
    """mean_i cross_entropy(l_i, i) + lambda mean_i e_ii."""
    target = torch.arange(len(errors), device=errors.device)
    matching = errors.diagonal().mean()
    return F.cross_entropy(logits(errors, temperature, scale), target) + denoising_weight * matching


def retrieval_accuracy(errors: Tensor) -> float:
    """Share of images whose own caption has the smallest error."""
    own = torch.arange(len(errors), device=errors.device)
    return (errors.argmin(dim=1) == own).float().mean().item()


def mutual_information(errors: Tensor, elements: int) -> float:
    """Equation 20 at one timestep, unweighted: mean_i [log N + log softmax_j(-elements e_ij / 2)_i], in nats."""
    scores = torch.log_softmax(-elements * errors.double() / 2, dim=1).diagonal()
    return (torch.log(torch.tensor(float(len(errors)))) + scores.mean()).item()
