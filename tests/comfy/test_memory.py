"""What a run needs of the memory, and what it does when there is none; the GPU is played."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import comfy.model_management as memory
import pytest
import torch
from comfyui_softrepa.softrepa.comfy.training import memory_use, preflight
from comfyui_softrepa.softrepa.comfy.training.memory_use import (
    BESIDE_SAVED,
    MOST_ON_CPU,
    RAM_SHARE,
    AdaptivePairs,
    kept_bytes,
)
from comfyui_softrepa.softrepa.comfy.training.out_of_memory import is_out_of_memory
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training.loss import contrastive_loss, denoising_loss
from comfyui_softrepa.softrepa.training.pairs import MOST_KEPT, Guidance, StepBatch, backward_through_pairs
from softrepa_tests.golden_step import FAMILIES, TIMESTEP, golden_tokens, short_batch
from softrepa_tests.learning import dataset, moved_by, same_training, train
from softrepa_tests.sampling import relative_error
from softrepa_tests.tiny_models import HIDDEN, seeded
from softrepa_tests.token_sets import tokens_for


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("relative", [False, True])
def test_few_gradients_at_a_time_on_the_real_network(models, family, relative):
    """Row by row, or scored first where the loss looks at the whole batch."""

    def gradient(most_kept):
        tokens = tokens_for(family)
        shape = (tokens.layers, 4, tokens.hidden_width)
        with torch.inference_mode(False), torch.enable_grad():
            rows = seeded(shape, "rows", 0.5).clone().requires_grad_()
            network = TrainableNetwork(models[family], tokens.blocks)
            step = StepBatch.of_all(*short_batch(family), TIMESTEP[family])
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

    a_row = 3 * 4 * tokens_for(family).layers * 4 * tokens_for(family).hidden_width
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
    a_row = 5 * 4 * 5 * 4 * HIDDEN["sd3"]
    monkeypatch.setattr(defaults, (True, a_row))
    train(models, "sd3", batch_size=5, steps=1, temperature=2.0)
    assert kept == [4, 5, 5, 5, 5, 5]  # the first is the pre-flight's
    kept.clear()
    monkeypatch.setattr(defaults, (True, a_row - 1))
    train(models, "sd3", batch_size=5, steps=1, temperature=2.0)
    assert kept == [4]  # the errors first, then each pair's gradient by its weight
    kept.clear()
    relative = {"temperature": 1.0, "temperature_mode": "relative"}  # looks at the whole batch
    monkeypatch.setattr(defaults, (True, a_row))
    train(models, "sd3", batch_size=5, steps=1, preset="paper and guidance", **relative)
    assert kept == [4, 5]  # of the contrast as above, of guidance those of each image and its own caption


def test_captions_and_latents_wait_in_ram(models):
    """What a batch brings lies on the CPU until its pair's turn."""
    network = TrainableNetwork(models["sd3"], 5)
    with torch.inference_mode(False):
        _, seen, target, captions = network.prepared(StepBatch.of_all(*short_batch("sd3"), 500))
    assert {tensor.device.type for tensor in (seen, target, captions.of[0]["c_crossattn"])} == {"cpu"}


def test_the_load_is_told_what_a_pair_takes(models, token_folder, monkeypatch):
    asked, load = [], memory.load_models_gpu

    def noted(loaded, memory_required=0, **rest):
        asked.append(memory_required)
        return load(loaded, memory_required=memory_required, **rest)

    monkeypatch.setattr(memory, "load_models_gpu", noted)
    monkeypatch.setattr(AdaptivePairs, "one_by_one", with_pair_bytes(AdaptivePairs.one_by_one, 123_000_000))
    train(models, "sd3", steps=2)
    kept = kept_bytes(5 * 4 * HIDDEN["sd3"], 4)
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


def network_of(models, family: str) -> TrainableNetwork:
    return TrainableNetwork(models[family], tokens_for(family).blocks)


def step_of(family: str) -> StepBatch:
    with torch.inference_mode(False):
        return StepBatch.of_all(*short_batch(family), TIMESTEP[family])


def gradients(pairs: AdaptivePairs, family: str, micro_batch: int):
    tokens = tokens_for(family)
    with torch.inference_mode(False), torch.enable_grad():
        rows = seeded((tokens.layers, 4, tokens.hidden_width), "rows", 0.5)
        return pairs.gradients(rows, step_of(family), micro_batch)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_pair_keeps_is_counted_without_keeping_it(golden_models, family):
    """As much as autograd holds until the backward pass of a pair, and nothing of it is there afterwards."""
    network, tokens = network_of(golden_models, family), golden_tokens(family)
    network.checkpointing = False
    held, weights = {}, {w.untyped_storage().data_ptr() for w in network.base_model.diffusion_model.parameters()}

    def hold(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.inference_mode(False), torch.enable_grad():
        rows = seeded((tokens.layers, 4, tokens.hidden_width), "rows", 0.5)
        counted = network.saved_bytes(rows, step_of(family))
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            network.gradients(rows, replace(step_of(family), compared=torch.eye(3, dtype=torch.bool)[:1]), 1)
    assert 0.95 * sum(held.values()) <= counted <= 1.05 * sum(held.values())
    assert counted > 1e6


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_kept_where_those_of_a_pair_fit(models, family, monkeypatch, caplog):
    pairs = AdaptivePairs(network_of(models, family), is_auto=True)
    kept = gradients(pairs, family, 0)
    assert not pairs.network.checkpointing
    assert pairs.at_once >= 9
    monkeypatch.setattr(memory, "get_free_memory", lambda *_: pairs.pair_bytes)  # of which others get their share
    small = AdaptivePairs(network_of(models, family), is_auto=True)
    with caplog.at_level("INFO"):
        computed_again = gradients(small, family, 0)
    assert small.network.checkpointing
    assert "activations are computed again (checkpointing)" in caplog.text
    assert relative_error(computed_again, kept) <= 1e-4


def test_pairs_fill_the_share_of_ram_that_they_may_have(models, monkeypatch):
    pairs = AdaptivePairs(network_of(models, "sd3"), is_auto=True)
    gradients(pairs, "sd3", 0)
    one = pairs.pair_bytes
    for fitting in (1, 4):
        room = (fitting + 0.5) * one + 9 * 4 * 5 * 4 * HIDDEN["sd3"]
        monkeypatch.setattr(memory, "get_free_memory", lambda *_, room=room: int(room / RAM_SHARE))
        pairs.at_once = 0
        gradients(pairs, "sd3", 0)
        assert pairs.at_once == fitting
    monkeypatch.setattr(memory, "get_free_memory", lambda *_: 2**50)
    pairs.at_once = 0
    gradients(pairs, "sd3", 0)
    assert pairs.at_once == MOST_ON_CPU // one


@pytest.mark.parametrize(("device", "seconds", "is_on"), [("mps", 3, False), ("mps", 1, True), ("cpu", 1, False)])
@pytest.mark.parametrize("runs_out", [False, True])
def test_a_step_is_timed_where_several_runs_of_pairs_fetch_weights(monkeypatch, device, seconds, is_on, runs_out):
    """Four of nine pairs fit, with checkpointing all; a step without it takes two seconds, or memory runs out in it.

    Weights lie on the CPU.
    """
    is_on = is_on or (runs_out and device == "mps")
    now, calls = [0], []

    def played(rows, step, micro_batch):
        calls.append((network.checkpointing, micro_batch))
        if runs_out and is_on and not network.checkpointing and micro_batch == 1:
            raise torch.OutOfMemoryError("no memory")
        now[0] += seconds if network.checkpointing else 2
        return torch.zeros(3, 3), torch.zeros(9, 1, 1, 1)

    network = SimpleNamespace(
        device=torch.device(device),
        checkpointing=True,
        saved_bytes=lambda *_: 100,
        gradients=played,
        base_model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)),
    )
    room = 4.5 * BESIDE_SAVED * 100 + 9 * 4
    monkeypatch.setattr(memory, "get_free_memory", lambda *_: int(room / RAM_SHARE) + 1)
    monkeypatch.setattr(memory_use, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    pairs = AdaptivePairs(network, is_auto=True)
    for _ in range(2):
        pairs.gradients(torch.zeros(1, 1, 1), step_of("sd3"), 0)
    kept = [(False, 1)] if runs_out else [(False, 1), (False, 4)]
    timed = [] if device == "cpu" else [*kept, (True, 1), (True, 9)]
    assert calls == timed + 2 * [(True, 9) if is_on else (False, 4)]
    assert pairs.pair_bytes == (25 if is_on else 125)


def runs_out_without_checkpointing(monkeypatch, after: int) -> list[tuple[bool, int]]:
    """From the call number `after` on; (checkpointing, pairs at once) of each call."""
    calls, whole = [], TrainableNetwork.gradients

    def played(self, rows, step, micro_batch):
        calls.append((self.checkpointing, micro_batch))
        if not self.checkpointing and len(calls) > after:
            raise torch.OutOfMemoryError("no memory")
        return whole(self, rows, step, micro_batch)

    monkeypatch.setattr(TrainableNetwork, "gradients", played)
    return calls


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_goes_on_with_checkpointing_where_memory_runs_out(models, token_folder, monkeypatch, caplog, after):
    """In the pre-flight, the first step and later: with the result of a run that had it from its start."""
    expected = moved_by(models["sd3"], "sd3", tokens_for("sd3"), steps=4, checkpointing="on")
    calls = runs_out_without_checkpointing(monkeypatch, after)
    ours = moved_by(models["sd3"], "sd3", tokens_for("sd3"), steps=4, checkpointing="auto")
    same_training(ours, expected)
    assert [is_on for is_on, _ in calls[:after]] == [False] * after
    assert calls[-1][0]
    assert caplog.text.count("out of memory for one pair, going on with checkpointing") == 1


GUIDED = ("unconditional", "gradients_and_predictions", "through_unconditional")


@pytest.mark.parametrize(("name", "is_learned"), [*((name, False) for name in GUIDED), ("guided", True)])
def test_a_guided_step_goes_on_with_fewer_at_once_where_memory_runs_out(models, monkeypatch, name, is_learned):
    """Wherever in it that is."""
    step = step_of("sd15").matching() if is_learned else step_of("sd15")
    objective = denoising_loss if is_learned else partial(contrastive_loss, temperature=2.0)

    def gradient(pairs):
        with torch.inference_mode(False), torch.enable_grad():
            rows = seeded((1, 4, 768), "rows", 0.5).clone().requires_grad_()
            guidance = Guidance(short_batch("sd15")[2][0], 2.0, is_learned)
            backward_through_pairs(rows, pairs, step, 3, objective, guidance=guidance)
        return rows.grad

    expected, calls, whole = gradient(network_of(models, "sd15")), [], getattr(TrainableNetwork, name)

    def played(self, *args):
        calls.append(args[-1])
        if args[-1] > 1:
            raise torch.OutOfMemoryError("no memory")
        return whole(self, *args)

    monkeypatch.setattr(TrainableNetwork, name, played)
    pairs = AdaptivePairs(network_of(models, "sd15"))
    assert relative_error(gradient(pairs), expected) <= 1e-5
    assert calls == [3, 1]
    assert pairs.at_once == 1


@pytest.mark.parametrize(("given", "is_on"), [(True, True), (False, False), ("on", True), ("off", False)])
def test_what_is_chosen_is_not_overruled(models, token_folder, monkeypatch, given, is_on):
    monkeypatch.setattr(memory, "get_free_memory", lambda *_, **__: 10**5 if given == "off" else 10**12)
    calls = runs_out_without_checkpointing(monkeypatch, 1000)
    train(models, "sd3", steps=2, micro_batch=2, checkpointing=given)
    assert {each for each, _ in calls} == {is_on}


def test_a_run_that_must_not_checkpoint_says_so_where_it_could(models, token_folder, monkeypatch):
    runs_out_without_checkpointing(monkeypatch, 0)
    with pytest.raises(SoftREPAError, match="turn checkpointing on or lower the dataset's resolution"):
        train(models, "sd3", checkpointing=False)


def test_checkpointing_is_no_part_of_what_a_run_is(models, token_folder):
    for steps, setting in enumerate((True, "auto", "off"), start=1):
        options = {"resume": True, "checkpoint_every": 1, "checkpointing": setting}
        assert train(models, "sd3", steps=steps, **options)[2] == steps
    with pytest.raises(SoftREPAError, match='checkpointing is "perhaps", expected one of auto, on, off, true, false'):
        train(models, "sd3", checkpointing="perhaps")


def test_gradients_that_are_told_are_of_the_pairs_that_are_compared(models, token_folder, monkeypatch):
    told = []
    monkeypatch.setattr(preflight, "memory_line", lambda pairs, rows, step: told.append(step.pairs) or "")
    options = {"dataset": dataset("sd3"), "batch_size": 4, "steps": 1, "temperature": 2.0}
    for more in ({}, {"negatives": 1}, {"negatives": 1, "hard_negatives": 1}):
        train(models, "sd3", **options, **more)
    assert told == [16, 8, 12]
