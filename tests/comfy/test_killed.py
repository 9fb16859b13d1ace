"""A training process killed at random moments, in the middle of whatever it does there."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy import folders
from comfyui_softrepa.softrepa.training import state as training_state
from softrepa_tests.learning import train

KILLS = 20
OFTEN = {"checkpoint_every": 1, "filename_prefix": "killed", "resume": True, "temperature": 2.0, "ema_decay": 0.9}


def endless(models) -> None:
    with torch.inference_mode():
        train(models, "sd3", steps=10**6, **OFTEN)


def wait_for_checkpoint(seconds: float = 60) -> None:
    before, end = written(), time.monotonic() + seconds
    while written() == before:
        assert time.monotonic() < end, f"no checkpoint within {seconds} s"
        time.sleep(0.01)


def written() -> tuple[Path, int] | None:
    """The newest checkpoint and when it was written. A run that is killed before its first one leaves none."""
    found = folders.states(OFTEN["filename_prefix"])
    return (found[0], found[0].stat().st_mtime_ns) if found else None


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL and no fork on Windows")
def test_killed_twenty_times(models, token_folder):
    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    moments, context, reached = random.Random(5), multiprocessing.get_context("fork"), []
    for kill in range(KILLS):
        process = context.Process(target=endless, args=(models,))
        process.start()
        if kill % 4:  # otherwise while it starts
            wait_for_checkpoint()
        time.sleep(moments.uniform(0.0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        state = written()
        reached.append(training_state.load(state[0]).step if state else 0)
        for tokens in token_folder.glob("*.safetensors"):  # written after the checkpoint, so never ahead of it
            assert int(token_files.load(tokens).metadata["steps"]) <= reached[-1]
    assert reached == sorted(reached)
    assert len(set(reached)) > KILLS // 2, reached
    steps = reached[-1] + 1
    killed = train(models, "sd3", steps=steps, **OFTEN)
    whole = train(models, "sd3", steps=steps, **OFTEN | {"filename_prefix": "whole"})
    assert torch.equal(killed[0].tokens, whole[0].tokens)
    assert torch.equal(killed[0].time_table, whole[0].time_table)
    assert killed[1] == whole[1]
    assert len(list(token_folder.glob("killed*.safetensors"))) == 1
