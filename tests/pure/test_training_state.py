"""Checkpoints of training runs: nothing half-written is ever read, wherever a process is killed."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training import state as training_state
from safetensors.torch import save_file
from softrepa_tests.toy_training import trainer


def run(path: Path, steps: int) -> None:
    """Train, or go on, with a checkpoint after every step."""
    one, records = trainer(learning_rate=0.02, ema_decay=0.9), []
    if path.exists():
        state = training_state.load(path)
        training_state.restore(one, state)
        records = list(state.records)
        for _ in records:
            one.next_batch(one.config.batch_size)
    while len(records) < steps:
        records.append(one.step(1))
        training_state.save(training_state.capture(one, records, [], {"drawn": len(records)}, {"seed": 0}), path)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL and no fork on Windows")
def test_killed_twenty_times(tmp_path):
    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    path = tmp_path / "run.checkpoint.safetensors"
    moments, context = random.Random(1), multiprocessing.get_context("fork")
    reached = []
    run(path, 1)  # what the optimiser imports is then here for all of them
    for number in range(20):
        process = context.Process(target=run, args=(path, 10**6))
        before, end = training_state.load(path).step, time.monotonic() + 60
        process.start()
        while number % 2 and training_state.load(path).step == before and time.monotonic() < end:
            time.sleep(0.01)  # every other one gets somewhere, however slow the machine
        time.sleep(moments.uniform(0.0, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(training_state.load(path).step)
    assert reached == sorted(reached)
    assert reached[-1] > reached[0]
    whole = tmp_path / "whole.checkpoint.safetensors"
    run(whole, reached[-1])
    killed, uninterrupted = training_state.load(path), training_state.load(whole)
    assert killed.records == uninterrupted.records
    assert all(torch.equal(value, uninterrupted.tensors[key]) for key, value in killed.tensors.items())


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.zeros(1)}, path)
    with pytest.raises(SoftREPAError, match=r'Checkpoint "tokens\.safetensors" is not of format softrepa-training 1'):
        training_state.load(path)


def test_differences_are_named():
    saved, now = {"seed": 1, "dataset": "a", "steps": 2}, {"seed": 2, "dataset": "a", "steps": 2}
    assert training_state.differences(saved, now) == ["seed was 1, is 2"]
    assert training_state.differences(saved, saved) == []
