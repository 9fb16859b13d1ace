"""One contrastive step: errors, losses and gradients of the reference, for any micro-batch."""

from pathlib import Path

import pytest
import torch
from comfyui_softrepa.softrepa.comfy.training.pairs import pair_errors
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.training.loss import contrastive_loss, information, retrieval_accuracy
from comfyui_softrepa.softrepa.training.pairs import StepBatch, backward_through_pairs
from comfyui_softrepa.softrepa.training.trainer import TrainableTokens
from safetensors.torch import load_file
from softrepa_tests.golden_step import FAMILIES, TIMESTEP, batch, golden_tokens
from softrepa_tests.sampling import relative_error

DATA = Path(__file__).parent.parent / "data"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("micro_batch", [1, 2, 9])
def test_errors_losses_and_gradients(golden_models, family, micro_batch):
    expected = load_file(DATA / f"train_{family}.safetensors")
    assert (
        relative_error(
            pair_errors(golden_models[family], golden_tokens(family), *batch(family), TIMESTEP[family], micro_batch),
            expected["errors"],
        )
        <= 1e-5
    )
    with torch.inference_mode(False), torch.enable_grad():
        for temperature in (0.07, 2.0):
            for weight in (0.0, 10.0):
                name = f"T{temperature}_d{weight}"
                tokens = TrainableTokens(golden_tokens(family))
                network = TrainableNetwork(golden_models[family], tokens.blocks)
                loss, errors = backward_through_pairs(
                    tokens.rows(TIMESTEP[family]),
                    network,
                    StepBatch.of_all(*batch(family), TIMESTEP[family]),
                    micro_batch,
                    lambda e, t=temperature, w=weight: contrastive_loss(e, t, denoising_weight=w),
                )
                assert relative_error(errors, expected["errors"]) <= 1e-5
                assert abs(loss - expected[f"loss_{name}"]) <= 1e-5 * expected[f"loss_{name}"].abs()
                table = tokens.time_table.grad
                used = TIMESTEP[family] // 10
                if temperature == 2.0 or weight:  # at 0.07 alone the gradient is nearly zero
                    shaped = expected[f"grad_tokens_{name}"].view(tokens.tokens.shape)
                    assert relative_error(tokens.tokens.grad, shaped) <= 1e-4
                    assert relative_error(table[used], expected[f"grad_table_bucket_{name}"]) <= 1e-4
                assert table[torch.arange(100) != used].abs().max() == 0


def single_graph(model, family, t, temperature, weight):
    """The plain implementation: one graph over all pairs, gradient by autograd alone."""
    tokens = TrainableTokens(golden_tokens(family))
    network = TrainableNetwork(model, tokens.blocks, checkpointing=False)
    latents, noise, conds = batch(family)
    sigma, seen, target, captions = network.prepared(StepBatch.of_all(latents, noise, conds, t))
    rows = tokens.rows(t)
    images = [i for i in range(3) for _ in range(3)]
    texts = [j for _ in range(3) for j in range(3)]
    with network.trainable():
        texts = captions.joined(texts, network.device)
        output = network.output(seen[images], sigma, texts, rows.expand(9, *rows.shape))
        errors = (output - target[images]).square().mean(dim=(1, 2, 3)).view(3, 3)
        loss = torch.nn.functional.cross_entropy(4.0 * torch.exp(-errors / temperature), torch.arange(3))
        loss = loss + weight * errors.diagonal().mean()
        loss.backward()
    return loss.detach(), tokens.tokens.grad, tokens.time_table.grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("t", [0, 1, 999])
def test_end_points_equal_the_single_graph(golden_models, family, t):
    with torch.inference_mode(False), torch.enable_grad():
        loss, token_gradient, table_gradient = single_graph(golden_models[family], family, t, 2.0, 1.0)
        tokens = TrainableTokens(golden_tokens(family))
        network = TrainableNetwork(golden_models[family], tokens.blocks)
        ours, _ = backward_through_pairs(
            tokens.rows(t),
            network,
            StepBatch.of_all(*batch(family), t),
            2,
            lambda e: contrastive_loss(e, 2.0, denoising_weight=1.0),
        )
    assert torch.isfinite(ours)
    assert abs(ours - loss) <= 1e-5 * loss.abs()
    assert relative_error(tokens.tokens.grad, token_gradient) <= 1e-4
    assert relative_error(tokens.time_table.grad, table_gradient) <= 1e-4


def test_weights_stay_as_they_were(golden_models):
    for family in FAMILIES:
        network = golden_models[family].model.diffusion_model
        before = {key: value.clone() for key, value in network.state_dict().items()}
        with torch.inference_mode(False), torch.enable_grad():
            single_graph(golden_models[family], family, 500, 2.0, 0.0)
        for key, value in network.state_dict().items():
            assert value.is_inference()
            assert torch.equal(value, before[key])


def test_loss_by_hand():
    errors = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
    logits = 4 * torch.exp(-errors / 0.5)
    by_hand = -(logits.softmax(1)[0, 0].log() + logits.softmax(1)[1, 1].log()) / 2 + 10 * 0.15
    assert torch.allclose(contrastive_loss(errors, 0.5, denoising_weight=10.0), by_hand)
    assert retrieval_accuracy(errors) == 1.0
    assert retrieval_accuracy(errors.flip(1)) == 0.0
    in_nats = torch.log_softmax(-8 * errors / 2, 1).diagonal() + torch.log(torch.tensor(2.0))
    assert torch.allclose(information(errors, 8).float(), in_nats)
