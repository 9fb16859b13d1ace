"""What a run needs of the memory, and what it does when there is none; the GPU is played."""

import comfy.model_management as memory
import pytest
import torch
from comfyui_softrepa.softrepa.comfy.training.memory_use import AdaptivePairs, kept_bytes
from comfyui_softrepa.softrepa.comfy.training.out_of_memory import is_out_of_memory
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.training.loss import contrastive_loss
from comfyui_softrepa.softrepa.training.pairs import MOST_KEPT, StepBatch, backward_through_pairs
from softrepa_tests.golden_step import TIMESTEP, batch, golden_tokens
from softrepa_tests.learning import train
from softrepa_tests.sampling import relative_error
from softrepa_tests.tiny_models import seeded


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("relative", [False, True])
def test_few_gradients_at_a_time_on_the_real_network(models, family, relative):
    """Row by row, or scored first where the loss looks at the whole batch."""

    def gradient(most_kept):
        tokens = golden_tokens(family)
        shape = (tokens.layers, 4, tokens.hidden_width)
        with torch.inference_mode(False), torch.enable_grad():
            rows = seeded(shape, "rows", 0.5).clone().requires_grad_()
            network = TrainableNetwork(models[family], tokens.blocks)
            step = StepBatch.of_all(*batch(family), TIMESTEP[family])
            backward_through_pairs(
                rows,
                network,
                step,
                2,
                lambda e: contrastive_loss(e, 1.0, 0.0 + 4.0, 1.0, relative),
                not relative,
                most_kept,
            )
        return rows.grad

    a_row = 3 * 4 * golden_tokens(family).layers * 4 * golden_tokens(family).hidden_width
    assert relative_error(gradient(a_row), gradient(MOST_KEPT)) <= 1e-4
    assert relative_error(gradient(1), gradient(MOST_KEPT)) <= 1e-4


def test_gradients_do_not_grow_with_the_batch(models, token_folder, monkeypatch):
    """At most `MOST_KEPT` bytes of them lie on the device, whatever the batch."""
    assert kept_bytes(30_720, 16) == 16 * 30_720 * 4
    assert kept_bytes(30_720, 256 * 256) == MOST_KEPT
    kept, gradients = [], TrainableNetwork.gradients

    def measured(self, rows, step, micro_batch):
        kept.append(step.pairs)
        return gradients(self, rows, step, micro_batch)

    monkeypatch.setattr(TrainableNetwork, "gradients", measured)
    defaults = "comfyui_softrepa.softrepa.training.pairs.backward_through_pairs.__defaults__"
    a_row = 5 * 4 * 5 * 4 * 384
    monkeypatch.setattr(defaults, (True, a_row))
    train(models, "sd3", batch_size=5, steps=1, temperature=2.0)
    assert kept == [4, 5, 5, 5, 5, 5]  # the first is the pre-flight's
    kept.clear()
    monkeypatch.setattr(defaults, (True, a_row - 1))
    train(models, "sd3", batch_size=5, steps=1, temperature=2.0)
    assert kept == [4]  # the errors first, then each pair's gradient by its weight


def test_captions_and_latents_wait_in_ram(models):
    """What a batch brings lies on the CPU until its pair's turn."""
    network = TrainableNetwork(models["sd3"], 5)
    with torch.inference_mode(False):
        _, seen, target, captions = network.prepared(StepBatch.of_all(*batch("sd3"), 500))
    assert {tensor.device.type for tensor in (seen, target, captions.of[0]["c_crossattn"])} == {"cpu"}


def test_the_load_is_told_what_a_pair_takes(models, token_folder, monkeypatch):
    asked, load = [], memory.load_models_gpu

    def noted(loaded, memory_required=0, **rest):
        asked.append(memory_required)
        return load(loaded, memory_required=memory_required, **rest)

    monkeypatch.setattr(memory, "load_models_gpu", noted)
    monkeypatch.setattr(AdaptivePairs, "one_by_one", with_pair_bytes(AdaptivePairs.one_by_one, 123_000_000))
    train(models, "sd3", steps=2)
    kept = kept_bytes(5 * 4 * 384, 4)
    guess = 3 * models["sd3"].model.memory_required([1, 16, 8, 8])
    assert asked[0] == asked[1] == kept + int(guess)
    assert asked[2:] == [kept + 123_000_000] * 2


def with_pair_bytes(one_by_one, number):
    def measuring(self, *args):
        found = one_by_one(self, *args)
        self.pair_bytes = number
        return found

    return measuring


def test_memory_that_ran_out_is_known_also_when_it_is_late(monkeypatch):
    discarded = []
    monkeypatch.setattr(memory, "discard_cuda_async_error", lambda: discarded.append(1), raising=False)
    late = getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory")
    for error in (torch.OutOfMemoryError("no"), late, RuntimeError("MPS backend out of memory (17 GB)")):
        discarded.clear()
        assert is_out_of_memory(error)
        assert discarded
    discarded.clear()
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not discarded
