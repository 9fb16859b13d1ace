"""Runs that stop and go on: the same tokens, bit for bit, and nothing lost or half-written on the way."""

import random
from pathlib import Path

import pytest
import torch
from comfyui_softrepa.softrepa import checkpoint, training_state
from comfyui_softrepa.softrepa.comfy import folders
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.families import FAMILIES
from comfyui_softrepa.softrepa.trainer import Trainer, new_tokens
from softrepa_tests.learning import dataset, train


@pytest.fixture(autouse=True)
def runs(comfy_folders):
    """The checkpoints' folder, emptied after the test."""
    import shutil

    folder = comfy_folders / "output" / folders.RUNS
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


OPTIONS = {"temperature": 2.0, "ema_decay": 0.9, "caption_dropout": 0.5, "checkpoint_every": 0}


def same(first, second) -> bool:
    tables = (first.time_table, second.time_table)
    return torch.equal(first.tokens, second.tokens) and (tables == (None, None) or torch.equal(*tables))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Prodigy"])
def test_resumed_at_half(models, token_folder, family, optimizer):
    options = OPTIONS | {"optimizer": optimizer}
    whole = train(models, family, steps=4, filename_prefix="whole", **options)
    half = train(models, family, steps=2, filename_prefix="half", **options)
    rest = train(models, family, steps=4, filename_prefix="half", resume=True, **options)
    assert not same(half[0], whole[0])
    assert same(rest[0], whole[0])
    assert rest[1] == whole[1]
    assert rest[3] == half[3]
    assert same(checkpoint.load(rest[3]), whole[0])


def test_interrupted_at_any_step(models, token_folder, monkeypatch):
    import comfy.model_management as memory

    moments = random.Random(3)
    fuse = None

    def interrupt():
        nonlocal fuse
        if fuse is not None:
            fuse -= 1
            if fuse < 0:
                fuse = None
                raise memory.InterruptProcessingException

    monkeypatch.setattr(memory, "throw_exception_if_processing_interrupted", interrupt)
    stops = 0
    while stops < 20:
        fuse = moments.randrange(1, 25)  # asked once before each step and once before each of its four pairs
        try:
            rest = train(models, "sd3", steps=10, filename_prefix="broken", resume=True, micro_batch=1, **OPTIONS)
            break
        except memory.InterruptProcessingException:
            stops += 1
    fuse = None
    rest = train(models, "sd3", steps=10, filename_prefix="broken", resume=True, micro_batch=1, **OPTIONS)
    single = train(models, "sd3", steps=10, filename_prefix="single", micro_batch=1, **OPTIONS)
    assert stops >= 3
    assert same(rest[0], single[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, r"learning_rate was 0\.01, is 0\.5"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"init_tokens": new_tokens(FAMILIES["sd3"], 384, 4, 5, True, 1, None)}, "init_tokens was None, is"),
        ({"n_tokens": 2}, "n_tokens was 4, is 2"),
        ({"dataset": dataset("sd3", 5)}, "dataset was"),
    ],
)
def test_another_configuration_is_refused(models, token_folder, change, message):
    train(models, "sd3", steps=1, filename_prefix="run")
    with pytest.raises(SoftREPAError, match=rf"run_00001\.checkpoint\.safetensors is of another run.*{message}"):
        train(models, "sd3", steps=2, filename_prefix="run", resume=True, **change)
    assert checkpoint.load(token_folder / "run_00001.safetensors").metadata["steps"] == "1"


def test_nothing_to_resume_starts_anew(models, token_folder):
    assert train(models, "sd3", steps=1, filename_prefix="fresh", resume=True)[2] == 1


def test_the_newest_run_of_the_prefix_is_resumed(models, token_folder):
    train(models, "sd3", steps=1, filename_prefix="a")
    newest = train(models, "sd3", steps=2, filename_prefix="a")[3]
    train(models, "sd3", steps=1, filename_prefix="a_b")
    again = train(models, "sd3", steps=3, filename_prefix="a", resume=True)
    assert (again[2], again[3]) == (3, newest)


def test_broken_checkpoints_are_named(models, token_folder, runs):
    train(models, "sd3", steps=1, filename_prefix="run")
    path = runs / "run_00001.checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SoftREPAError, match=r'Checkpoint "run_00001\.checkpoint\.safetensors" cannot be read'):
        train(models, "sd3", steps=2, filename_prefix="run", resume=True)


def test_a_full_disk_is_said_and_training_goes_on(models, token_folder, monkeypatch, caplog):
    save = training_state.save
    full = [True]

    def sometimes(state, path):
        if full[0]:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(training_state, "save", sometimes)
    step = Trainer.step

    def freed(self, micro_batch):
        full[0] = self.step_index < 2
        return step(self, micro_batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", freed)
        tokens = train(models, "sd3", steps=4, checkpoint_every=1, filename_prefix="run")
    assert "step 1 could not be saved" in caplog.text
    assert "No space left on device" in caplog.text
    assert same(checkpoint.load(tokens[3]), tokens[0])
    full[0] = True
    with pytest.raises(SoftREPAError, match=r"could not be written.*No space left.*saved until now: step 0 of 1"):
        train(models, "sd3", steps=1, filename_prefix="other")
    assert not Path(token_folder / "other_00001.safetensors").exists()


def test_a_loss_that_is_no_number_keeps_what_was_learned(models, token_folder, monkeypatch):
    from comfyui_softrepa.softrepa.comfy.pairs import PairNetwork

    gradients = PairNetwork.gradients
    calls = []

    def poisoned(self, *args):
        errors, found = gradients(self, *args)
        calls.append(1)
        return (errors * float("nan") if len(calls) == 4 else errors), found

    monkeypatch.setattr(PairNetwork, "gradients", poisoned)
    with pytest.raises(SoftREPAError, match="The loss is nan at step 3, expected a number"):
        train(models, "sd3", steps=9, filename_prefix="run")
    assert checkpoint.load(token_folder / "run_00001.safetensors").metadata["steps"] == "2"
