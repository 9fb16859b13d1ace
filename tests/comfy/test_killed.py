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
from comfyui_softrepa.softrepa import checkpoint, training_state
from comfyui_softrepa.softrepa.comfy import folders
from softrepa_tests.learning import train

KILLS = 20
OFTEN = {"checkpoint_every": 1, "filename_prefix": "killed", "resume": True, "temperature": 2.0, "ema_decay": 0.9}


def endless(models) -> None:
    with torch.inference_mode():
        train(models, "sd3", steps=10**6, **OFTEN)


def wait_for_change(path: Path, seconds: float = 60) -> None:
    before, end = modified(path), time.monotonic() + seconds
    while modified(path) == before and time.monotonic() < end:
        time.sleep(0.01)


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL and no fork on Windows")
def test_killed_twenty_times(models, comfy_folders, token_folder):
    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    tokens = token_folder / "killed_00001.safetensors"
    state = comfy_folders / "output" / folders.RUNS / "killed_00001.checkpoint.safetensors"
    moments, context, reached = random.Random(5), multiprocessing.get_context("fork"), []
    for kill in range(KILLS):
        process = context.Process(target=endless, args=(models,))
        process.start()
        if kill % 4:  # otherwise while it starts
            wait_for_change(state)
        time.sleep(moments.uniform(0.0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(training_state.load(state).step if state.exists() else 0)
        if tokens.exists():  # written after the checkpoint, so never ahead of it
            assert int(checkpoint.load(tokens).metadata["steps"]) <= reached[-1]
    assert reached == sorted(reached)
    assert len(set(reached)) > KILLS // 2, reached
    steps = reached[-1] + 1
    killed = train(models, "sd3", steps=steps, **OFTEN)
    whole = train(models, "sd3", steps=steps, **OFTEN | {"filename_prefix": "whole"})
    assert torch.equal(killed[0].tokens, whole[0].tokens)
    assert torch.equal(killed[0].time_table, whole[0].time_table)
    assert killed[1] == whole[1]
    assert len(list(token_folder.glob("killed*.safetensors"))) == 1
