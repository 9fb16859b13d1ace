"""Several processes train on the real networks what one trains; the first of them writes."""

import os
import signal
import sys
from types import SimpleNamespace

import comfy.model_management as memory
import pytest
import torch
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy import folders, startup
from comfyui_softrepa.softrepa.comfy.training import devices
from comfyui_softrepa.softrepa.comfy.training.launch import launch
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

STEPS = 4
WAYS = {
    "paper": {"temperature": 2.0, "ema_decay": 0.9, "caption_dropout": 0.5},
    "hard negatives": {"preset": "hard negatives", "temperature": 1.0, "temperature_mode": "relative"},
    "AGSM": {"preset": "AGSM", "hard_negatives": 1, "accumulation": 2},
}


def dataset(family: str, wrong: str = "") -> Dataset:
    images = [Example(f"{i}.png", f"digest{i}", (f"cat {i} on {wrong}mat {i}",), (64, 64)) for i in range(8)]
    return Dataset("toy", images[:5], images[5:], InMemory(family), [])


def run(ranks, models, family, double=False, data=None, **options):
    """The tokens, the errors of every batch as the first process has them, and the records."""
    errors, contrast, init = [], Trainer._contrast, Trainer.__init__

    def spied(self, *args):
        found = contrast(self, *args)
        errors.append(found[1].clone())
        return found

    def doubled(self, *args):
        init(self, *args)
        self.tokens.double()

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(Trainer, "_contrast", spied)
        if double:
            patch.setattr(Trainer, "__init__", doubled)
        inputs = {"steps": STEPS, "batch_size": 3, "learning_rate": 1e-2, "micro_batch": 1, "preview_every": 2}
        said = []
        trained = launch(
            models[family], data or dataset(family), said.append, TrainingInputs(**inputs | options), ranks
        )
    return trained, errors, said


def tensors(tokens) -> dict:
    names = ("tokens", "time_table", "negative_tokens")
    return {name: getattr(tokens, name) for name in names if getattr(tokens, name) is not None}


def close(tokens, expected, tolerance: float) -> None:
    for name, value in tensors(expected).items():
        assert (tensors(tokens)[name] - value).abs().max() <= tolerance * value.abs().max(), name


@forks
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("family", "count"), [("sd3", 2), ("sd15", 3)])
def test_several_processes_learn_what_one_does(models, token_folder, family, count, name):
    expected, errors, _ = run(ALONE, models, family, **WAYS[name], filename_prefix="alone")
    first, *others = together(count, run, models, family)  if False else together(
        count, lambda ranks: run(ranks, models, family, **WAYS[name], filename_prefix="several")
    )
    trained, seen, said = first
    assert len(seen) == len(errors)
    assert all(torch.equal(one, other) for one, other in zip(seen[:1], errors[:1], strict=True))
    close(trained.tokens, expected.tokens, 1e-4)
    assert [record.timestep for record in trained.records] == [record.timestep for record in expected.records]
    written = [path.name for path in token_folder.glob("several*")]
    assert written == ["several_00001.safetensors"]
    assert tensors(token_files.load(token_folder / written[0])).keys() == tensors(expected.tokens).keys()
    assert "held out: loss" in said[-1]
