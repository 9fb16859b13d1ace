"""The loss of AGSM on a MODEL's own network: each pair's prediction regressed onto an aim of its own."""

import comfy.model_management as memory
import torch
from torch import Tensor

from ...training.noising import pair_error
from ...training.pairs import Aims, StepBatch, weighted_sum
from .trainable import TrainableNetwork, gradient_of, with_foreign_tensors

Pair = tuple[int, int]
"""An image and a caption, by index."""


@with_foreign_tensors
def regression(
    network: TrainableNetwork,
    aims: Aims,
    banks: Tensor,
    teacher: Tensor,
    batch: StepBatch,
    weights: Tensor,
    micro_batch: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (`softrepa.training.agsm`), errors (B, J) and the loss's gradient by `banks` (2, L, m, d).

    Each pair's regression counts `weights` (B, J), and of an image all pairs are compared, or none.

    Image i is predicted under caption i with the first bank, under the others it is compared with by the second. What
    each is regressed onto comes by `aims` from predictions with `teacher` (2, L, m, d); these are kept for as many
    images as have `micro_batch` captions, or one.
    """
    with network.trainable():
        return _regression(network, aims, banks, teacher, batch, weights, micro_batch)


def _regression(network, aims, banks, teacher, batch, weights, micro_batch):
    sigma, seen, target, captions = network.prepared(batch)
    device, compared = network.device, batch.compared
    banks, teacher = banks.to(device), teacher.to(device)
    errors, distances = (torch.zeros(compared.shape, device=device) for _ in range(2))
    gradient = torch.zeros(banks.shape, dtype=torch.float64)

    def predicted(images: list[int], texts: list[int], rows: Tensor) -> Tensor:
        memory.throw_exception_if_processing_interrupted()
        return network.output(seen[images], sigma, captions.joined(texts, device), rows)

    at_once = max(1, micro_batch // max(1, int(compared.sum(dim=1).max())))
    for group in compared.any(dim=1).nonzero().flatten().split(at_once):
        those = torch.zeros_like(compared)
        those[group] = compared[group]
        runs = list(captions.runs(micro_batch, those))
        kept: dict[Pair, Tensor] = {}
        with torch.no_grad():
            for images, texts in runs:
                output = predicted(images, texts, teacher[_banks(images, texts)])
                kept.update(zip(zip(images, texts, strict=True), output.float(), strict=True))
        for i in group.tolist():
            own = [pair for pair in kept if pair[0] == i]
            is_own = torch.tensor([j == i for _, j in own], device=device)
            kept.update(
                zip(own, aims(target[i].to(device), torch.stack([kept[pair] for pair in own]), is_own), strict=True)
            )
        for images, texts in runs:
            places = _banks(images, texts)
            leaf = banks[places].clone().requires_grad_()
            output = predicted(images, texts, leaf)
            aim = torch.stack([kept[pair] for pair in zip(images, texts, strict=True)])
            distance, counted = pair_error(output, aim), weights[images, texts]
            of_pairs = gradient_of(distance, leaf, aim[0].numel())
            for bank, total in enumerate(gradient):
                total += weighted_sum(counted * (places == bank), of_pairs)
            distances[images, texts] = distance.detach()
            errors[images, texts] = pair_error(output.detach(), target[images].to(device))
    return (weights * distances.cpu()).sum(dtype=torch.float64), errors, gradient


def _banks(images: list[int], texts: list[int]) -> Tensor:
    """0 for an image's own caption, 1 for another."""
    return torch.tensor([int(i != j) for i, j in zip(images, texts, strict=True)])
