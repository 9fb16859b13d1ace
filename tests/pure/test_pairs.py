"""The token gradient from pair gradients, however many of these are kept at a time."""

from dataclasses import replace

import pytest
import torch
from comfyui_softrepa.softrepa.training.loss import comparison, contrastive_loss, denoising_loss
from comfyui_softrepa.softrepa.training.pairs import Guidance, StepBatch, backward_through_pairs
from comfyui_softrepa.softrepa.training.ranks import ALONE, Ranks
from softrepa_tests.toy_training import WIDTH, ToyPairs

WRONG = (2, 0, 1, 3)
OBJECTIVES = {
    "paper": (lambda compared: lambda e: contrastive_loss(e, 1.0, denoising_weight=0.5, compared=compared), True),
    "denoising": (lambda compared: denoising_loss, True),
    "relative": (lambda compared: lambda e: contrastive_loss(e, 1.0, relative=True, compared=compared), False),
    "symmetric": (lambda compared: lambda e: contrastive_loss(e, 1.0, symmetric=True, compared=compared), False),
}


def toy_batch() -> StepBatch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 2, 2, 2, generator=generator)
    conds = [{"name": j, "cross_attn": torch.randn(WIDTH, generator=generator)} for j in range(4 + sum(WRONG))]
    return StepBatch(latents, torch.zeros(1, 2, 2, 2), conds, 500, comparison(WRONG))


class Counting(ToyPairs):
    """Says how many gradients it gave at a time."""

    def __init__(self):
        super().__init__()
        self.given, self.scored = [], 0

    def gradients(self, rows, batch, micro_batch):
        errors, gradients = super().gradients(rows, batch, micro_batch)
        self.given.append(len(gradients))
        return errors, gradients

    def errors(self, rows, batch, micro_batch):
        self.scored += 1
        return ToyPairs.gradients(self, rows, batch, micro_batch)[0]

    def weighted_gradient(self, rows, batch, weights, micro_batch):
        gradients = ToyPairs.gradients(self, rows, batch, micro_batch)[1]
        return torch.einsum("p,p...->...", weights[batch.compared], gradients)


class Curved(ToyPairs):
    """Predictions are no line in the rows."""

    def moved(self, rows):
        return rows.mean(dim=(0, 1)).square()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("kept", "parts"), [(7, [6, 4, 5, 7]), (11, [10, 5, 7]), (100, [22]), (5, None)])
def test_any_number_of_kept_gradients_gives_the_gradient_of_one_graph(name, kept, parts):
    batch = toy_batch()
    objective, is_by_row = OBJECTIVES[name][0](batch.compared), OBJECTIVES[name][1]
    rows = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    errors = torch.stack(
        [
            torch.stack(
                [(x.flatten() - cond["cross_attn"] - rows.mean(dim=(0, 1))).square().mean() for cond in batch.conds]
            )
            for x in batch.latents
        ]
    )
    plain = objective(errors * batch.compared)
    (expected,) = torch.autograd.grad(plain, rows)

    pairs, ours = Counting(), rows.detach().clone().requires_grad_()
    value, found = backward_through_pairs(ours, pairs, batch, 2, objective, is_by_row, kept * 4 * rows.numel())
    assert torch.allclose(value, plain)
    assert torch.allclose(found, errors.detach() * batch.compared)
    assert torch.allclose(ours.grad, expected, atol=1e-6)
    if parts and (is_by_row or len(parts) == 1):
        assert (pairs.given, pairs.scored) == (parts, 0)
    else:
        assert (pairs.given, pairs.scored) == ([], 1)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kept", [1, 7, 22])
def test_guided_predictions_give_the_gradient_of_one_graph(name, kept):
    """However many are kept; in float64."""
    batch, scale = toy_batch(), 3.0
    doubled = [cond | {"cross_attn": cond["cross_attn"].double()} for cond in batch.conds]
    batch = replace(batch, latents=batch.latents.double(), conds=doubled)
    empty = {"name": "", "cross_attn": torch.linspace(-1, 1, WIDTH, dtype=torch.float64)}
    objective, is_by_row = OBJECTIVES[name][0](batch.compared), OBJECTIVES[name][1]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 2, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    nothing = empty["cross_attn"] + rows.mean(dim=(0, 1)).square()
    errors = torch.zeros(batch.compared.shape, dtype=torch.float64)
    for i, j in batch.compared.nonzero().tolist():
        own = batch.conds[j]["cross_attn"] + rows.mean(dim=(0, 1)).square()
        errors[i, j] = (nothing + scale * (own - nothing) - batch.latents[i].flatten()).square().mean()
    plain = objective(errors)
    (expected,) = torch.autograd.grad(plain, rows)

    ours = rows.detach().clone().requires_grad_()
    most = kept * 4 * (rows.numel() + batch.latents[0].numel())
    guidance = Guidance(empty, scale)
    value, found = backward_through_pairs(ours, Curved(), batch, 2, objective, is_by_row, most, guidance=guidance)
    assert torch.allclose(value, plain, rtol=1e-12)
    assert torch.allclose(found, errors, rtol=1e-12)
    assert torch.allclose(ours.grad, expected, rtol=1e-10, atol=1e-14)


class Part(Ranks):
    """One of two processes, whose sums are its own summands."""

    def __init__(self, index):
        self.index, self.count = index, 2


@pytest.mark.parametrize("is_by_row", [True, False])
@pytest.mark.parametrize("kept", [2, 3, 4])
def test_processes_learn_guided_predictions_of_all_images(kept, is_by_row):
    """However many pairs are kept. The loss is a sum over images, so its gradient is one over processes."""
    batch = toy_batch()
    batch = batch.only(torch.eye(4, len(batch.conds), dtype=torch.bool))
    guidance = Guidance({"name": "", "cross_attn": torch.linspace(-1, 1, WIDTH)}, 3.0, is_learned=True)
    found = []
    for ranks in (ALONE, Part(0), Part(1)):
        rows = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        most = 100 if ranks is ALONE else kept
        size = 4 * rows.numel()
        backward_through_pairs(
            rows, ToyPairs(), batch, 2, denoising_loss, is_by_row, most * size, ranks=ranks, guidance=guidance
        )
        found.append(rows.grad)
    assert torch.allclose(found[1] + found[2], found[0], atol=1e-6)
    assert all(one.any() for one in found)


def test_parts_are_whole_rows():
    batch = toy_batch()
    parts = batch.parts(11)
    assert [part.pairs for part in parts] == [10, 5, 7]
    assert torch.equal(torch.stack([part.compared for part in parts]).sum(0).bool(), batch.compared)
