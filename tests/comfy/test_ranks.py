"""Several processes train on the real networks what one trains, and only the first of them writes."""

import os
import signal
import sys
from types import SimpleNamespace

import comfy.model_management as memory
import pytest
import torch
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy import headless, startup
from comfyui_softrepa.softrepa.comfy.training import devices
from comfyui_softrepa.softrepa.comfy.training.launch import launch
from comfyui_softrepa.softrepa.comfy.training.reports import Measured, Samples
from comfyui_softrepa.softrepa.comfy.training.score import HeldOut, score
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.data.batches import Example
from comfyui_softrepa.softrepa.data.dataset import Dataset
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training.inputs import TrainingInputs
from comfyui_softrepa.softrepa.training.ranks import ALONE, EndedError
from comfyui_softrepa.softrepa.training.trainer import Trainer
from softrepa_tests.learning import InMemory
from softrepa_tests.processes import together

forks = pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")

WAYS = {
    "paper": {"temperature": 2.0, "ema_decay": 0.9, "caption_dropout": 0.5, "accumulation": 2},
    "hard negatives": {"preset": "hard negatives", "temperature": 1.0, "temperature_mode": "relative"},
    "guided contrast": {"objective": "guided contrast", "guidance_scale": 2.0, "temperature": 2.0},
    "paper and guidance": {"preset": "paper and guidance", "guidance_scale": 2.0, "temperature": 2.0},
    "AGSM": {"preset": "AGSM", "hard_negatives": 1},
}


def dataset(family: str, held_out: int = 2, wrong: str = "") -> Dataset:
    images = [Example(f"{i}.png", f"digest{i}", (f"cat {i} on {wrong}mat {i}",), (64, 64)) for i in range(6)]
    part = len(images) - held_out
    return Dataset("toy", images[:part], images[part:], InMemory(family), [])


def run(ranks, models, family, data=None, **options):
    """What training gives, the errors of every batch, and what was said."""
    errors, contrast, said = [], Trainer._contrast, []

    def spied(self, *args):
        found = contrast(self, *args)
        errors.append(found[1].clone())
        return found

    inputs = {"steps": 2, "batch_size": 3, "learning_rate": 1e-2, "micro_batch": 1, "checkpointing": False}
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(Trainer, "_contrast", spied)
        data = data or dataset(family)
        trained = launch(models[family], data, said.append, TrainingInputs(**inputs | options), ranks=ranks)
    return trained, errors, said


def tensors(tokens) -> dict:
    names = ("tokens", "time_table", "negative_tokens")
    return {name: getattr(tokens, name) for name in names if getattr(tokens, name) is not None}


def same(tokens, expected, tolerance: float = 1e-5) -> None:
    for name, value in tensors(expected).items():
        assert (tensors(tokens)[name] - value).abs().max() <= tolerance * value.abs().max(), name


@forks
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("family", "count"), [("sd3", 2), ("sd15", 3)])
def test_several_processes_learn_what_one_does(models, token_folder, family, count, name):
    expected, errors, _ = run(ALONE, models, family, **WAYS[name], filename_prefix="alone")
    options = WAYS[name] | {"filename_prefix": "several"}
    (trained, seen, said), *others = together(count, lambda ranks: run(ranks, models, family, **options))
    assert len(seen) == len(errors) == (0 if name == "AGSM" else 2 * options.get("accumulation", 1))
    assert all(torch.equal(one, other) for one, other in zip(seen, errors, strict=True))
    same(trained.tokens, expected.tokens)
    assert [record.timestep for record in trained.records] == [record.timestep for record in expected.records]
    (written,) = token_folder.glob("several*")
    same(token_files.load(written), expected.tokens)
    assert any("held out: loss" in text for text in said)
    for _, seen_there, said_there in others:
        assert all(torch.equal(one, other) for one, other in zip(seen_there, errors, strict=True))
        assert said_there == said or "step 2/2" in said_there[-1]


@forks
def test_another_number_of_processes_goes_on(models, token_folder):
    """From a checkpoint that only the first process can read."""
    options = {**WAYS["paper"], "steps": 3}
    whole, _, _ = run(ALONE, models, "sd15", **options, filename_prefix="whole")

    def part(ranks, steps):
        return run(ranks, models, "sd15", **options | {"steps": steps, "filename_prefix": "parts", "resume": True})[0]

    together(3, part, 1)
    together(2, part, 2)
    rest = part(ALONE, 3)
    same(rest.tokens, whole.tokens)
    assert [record.timestep for record in rest.records] == [record.timestep for record in whole.records]
    assert len(list(token_folder.glob("parts*"))) == 1


@forks
def test_scores_do_not_depend_on_the_number_of_processes(models):
    def scored(ranks):
        with torch.inference_mode():
            batches = HeldOut(dataset("sd15", held_out=3), 3, 1, 0)
            return score(models["sd15"], batches, (300, 700), micro_batch=1, ranks=ranks)

    expected = scored(ALONE)
    for found in together(2, scored):
        for name in ("retrieved", "losses", "information"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def failing(models, count: int, patches, data=None, **options) -> list:
    """What ends each process; `patches(patch, ranks)` says what goes wrong in it."""

    def work(ranks):
        with pytest.MonkeyPatch.context() as patch:
            patches(patch, ranks)
            return run(ranks, models, "sd15", data and data(ranks), **options | {"steps": 1000})

    return together(count, work)


def saved(token_folder, prefix: str) -> int:
    (path,) = token_folder.glob(f"{prefix}*")
    return int(token_files.load(path).metadata["steps"])


@forks
def test_what_ends_one_of_them_ends_all_and_the_first_saves(models, token_folder):
    step = Trainer.step

    def interrupted(patch, ranks):
        def at_third(self, *args):
            if self.step_index == 2 and ranks.index == 1:
                memory.interrupt_current_processing()
            return step(self, *args)

        patch.setattr(Trainer, "step", at_third)

    found = failing(models, 2, interrupted, filename_prefix="interrupted", temperature=2.0)
    assert type(found[0]) is KeyboardInterrupt
    assert type(found[1]) is memory.InterruptProcessingException
    assert saved(token_folder, "interrupted") == 2

    def killed(patch, ranks):
        def at_third(self, *args):
            if self.step_index == 2 and ranks.index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args)

        patch.setattr(Trainer, "step", at_third)

    found = failing(models, 2, killed, filename_prefix="killed", temperature=2.0)
    assert type(found[0]) is EndedError
    assert "has lost another one" in str(found[0])
    assert found[1] is None
    assert saved(token_folder, "killed") == 2


@forks
def test_who_measures_together_ends_together_and_a_preview_may_fail(models, token_folder):
    def without_memory(patch, ranks):
        after = Measured.after

        def fails(self, record, session):
            if ranks.index == 1 and record.step == 2:
                raise RuntimeError("no memory")
            after(self, record, session)

        patch.setattr(Measured, "after", fails)
        patch.setattr(Samples, "after", fails)

    found = failing(models, 2, without_memory, preview_every=1, filename_prefix="measured", temperature=2.0)
    assert str(found[0]) == "Process 2 of 2 has stopped: RuntimeError: no memory"
    assert type(found[1]) is RuntimeError
    assert saved(token_folder, "measured") == 2


@forks
def test_less_memory_on_one_of_them_is_its_own_affair(models, token_folder):
    gradients, options = TrainableNetwork.gradients, {"temperature": 2.0, "micro_batch": 4}

    def work(ranks, sizes):
        def out_of_memory(self, rows, batch, micro_batch):
            if micro_batch > 2 and ranks.index == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            sizes.append(micro_batch)
            return gradients(self, rows, batch, micro_batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainableNetwork, "gradients", out_of_memory)
            return run(ranks, models, "sd15", **options)[0].tokens, sizes

    expected, sizes = work(ALONE, [])
    assert sizes[-1] == 4
    (first, sizes), (_, halved) = together(2, work, [])
    assert (sizes[-1], halved[-1]) == (4, 2)
    same(first, expected, 1e-4)


@forks
def test_other_images_than_the_first_ones_are_refused(models, token_folder):
    found = failing(
        models, 2, lambda patch, ranks: None, lambda ranks: dataset("sd15", wrong="big " * ranks.index), temperature=2.0
    )
    assert "Process 2 of 2 is not like the first (dataset was" in str(found[0])
    assert not list(token_folder.glob("*.safetensors"))


@forks
def test_a_process_without_a_device_of_its_own_is_refused():
    """More processes than GPUs: the rest would compute on the CPU."""

    def work(ranks):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "get_torch_device", lambda: torch.device("cpu" if ranks.index else "cuda"))
            headless.common({}, ranks)

    assert "Process 2 of 2 is not like the first (device was cuda, is cpu)" in str(together(2, work)[0])


def test_each_process_has_its_own_device(monkeypatch):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert startup.device_of_process(None) is None
    assert startup.device_of_process("1,0") == "1,0"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert startup.device_of_process(None) == "2"
    assert startup.device_of_process("1,0,5") == "5"
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert startup.device_of_process(None) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert startup.device_of_process(None) == "7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with pytest.raises(SoftREPAError, match='3 processes are started for the devices "4,6", expected one for each'):
        startup.device_of_process(None)


def test_a_run_on_one_of_several_gpus_says_so(models, token_folder, monkeypatch):
    data = dataset("sd15")
    data.settings = {"folder": "toy"}
    monkeypatch.setattr(devices, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 4)))
    said = run(ALONE, models, "sd15", data, steps=1, temperature=2.0)[2][-1]
    assert "This run uses one of 4 GPUs." in said
    assert f'--nproc-per-node=4 -m softrepa train "{token_folder / "trained_00001.safetensors"}"' in said
    monkeypatch.setattr(devices, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 1)))
    assert "GPU" not in run(ALONE, models, "sd15", data, steps=1, temperature=2.0)[2][-1]
