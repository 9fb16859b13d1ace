"""Alignment-guided score matching, the successor of the contrastive loss (AGSM, arXiv 2605.30038).

Two banks of tokens: an image's own caption is predicted with the first, every other caption with the second. Each
prediction is regressed onto the true target, moved by what sets its caption apart from the image's other captions in
the eyes of a slow copy of the tokens.
"""

import torch
from torch import Tensor

from .noising import pair_error

TEMPERATURE = 0.1
POSITIVE_GUIDANCE = 1.0
NEGATIVE_GUIDANCE = 0.1
TEACHER_DECAY = 0.9999


def aims(
    target: Tensor,
    predictions: Tensor,
    is_own: Tensor,
    temperature: float = TEMPERATURE,
    positive: float = POSITIVE_GUIDANCE,
    negative: float = NEGATIVE_GUIDANCE,
) -> Tensor:
    """Of one image: what each caption's prediction is regressed onto, (J, C, H, W) float32.

    target: v (C, H, W), or with frames (C, 1, H, W); predictions: v_j of the copy, (J, *target.shape); is_own: (J,)
    bool. With w = softmax_j(-e_j / T) and g_j = v_j - sum_k w_k v_k it is v + positive g_j for the own caption and
    v - negative g_j for the others.
    """
    predictions, target = predictions.float(), target.float()
    weights = torch.softmax(-pair_error(predictions, target.expand_as(predictions)) / temperature, dim=0)
    guidance = predictions - torch.einsum("j,j...->...", weights, predictions)
    factor = torch.where(is_own, positive, -negative).to(guidance)
    return target + factor.view(-1, *[1] * target.ndim) * guidance


def pair_weights(compared: Tensor) -> Tensor:
    """What each pair's regression counts, (B, J): the mean over own captions plus the mean over all other pairs."""
    is_own = torch.zeros_like(compared)
    is_own.fill_diagonal_(True)
    images = len(compared)
    others = (compared & ~is_own) / (compared.sum() - images)
    return torch.where(is_own, 1 / images, others)
