"""Every benchmark of real model sizes in its smallest form, and the one command for all of them."""

import json
import subprocess
import sys
import time

import pytest
import torch
from comfyui_softrepa.softrepa.comfy.training.run import outside_inference
from softrepa_tests.conftest import ROOT

from benchmarks import flowedit, gpu, ranks, sampling, training
from benchmarks.cases import build, soft_tokens
from softrepa.comfy.training.trainable import TrainableNetwork
from softrepa.training.ranks import ALONE
from softrepa.training.trainer import TrainableTokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[case for case in gpu.SMALL_CASES if case.size == 8], ids=lambda one: one.family)
def small(request):
    """A small case with its model and its tokens."""
    model = build(request.param, CPU, torch.float32)
    with torch.inference_mode():
        return request.param, model, soft_tokens(request.param, model)


def test_sampling(small):
    steps = sampling.measured(*small, rounds=1)
    assert steps.plain > 0
    assert list(steps.ratios) == ["plain again", "strength 1", "strength 0.5", "strength 0"]


def test_flowedit(small):
    case, model, _ = small
    steps = flowedit.measured(case, model, ("two", "four"), rounds=1)
    assert steps.plain > 0
    assert list(steps.ratios) == ["two", "four"]


@pytest.mark.parametrize("way", training.WAYS, ids=lambda way: way.title)
def test_training(small, way):
    case, model, tokens = small
    with outside_inference():
        trained = TrainableTokens(tokens)
        network = TrainableNetwork(model, trained.blocks, way.checkpointing)
        figures = training.measured(case, way, network, trained, count=2, rounds=1)
    assert figures.pairs_a_second > 0
    assert trained.tokens.grad.isfinite().all()
    assert figures.at_once == {None: 0, 0: 2}.get(way.micro_batch, way.micro_batch)


def test_ranks(small):
    case, _, _ = small
    (found,) = ranks.measured(case, 2, 2, 1, CPU, ALONE)
    assert found.alone > 0
    assert "/s" in ranks.line(case, [found], 4)


def test_the_training_command(capsys):
    case = next(case for case in gpu.SMALL_CASES if case.family == "sd3")
    training.measure(case, "float32", (2,), 1, CPU)
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line[:30].strip() for line in lines[1:]] == [way.title for way in training.WAYS]


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_without_a_gpu_it_says_what_it_would_measure(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = command()
    assert done.returncode == 0, done.stderr
    assert "No GPU here" in done.stdout
    assert sum(gpu.PARTS.values()) < 8 * 60 - 20
    for case in gpu.CASES:
        assert case.title in done.stdout
        assert case.family in gpu.PARTS
    for column in gpu.COLUMNS:
        assert column in done.stdout


def test_the_table_of_small_models():
    done = command("--small")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == [case.title for case in gpu.SMALL_CASES]
    assert {row.count(" | ") for row in rows} == {len(gpu.COLUMNS)}
    assert " - |" not in done.stdout


SLOW = """
import time
print('{"row": "a", "column": "training", "text": "1/s"}', flush=True)
time.sleep(600)
print('{"row": "a", "column": "offloaded", "text": "1/s"}', flush=True)
"""


def test_a_part_that_takes_too_long_is_ended_and_what_it_found_stays():
    start = time.monotonic()
    cells, trouble = gpu.collected([sys.executable, "-c", SLOW], seconds=10)
    assert time.monotonic() - start < 300
    assert cells == [gpu.Cell("a", "training", "1/s")]
    assert trouble == "was not done in 10 s"


def test_a_part_that_fails_is_said():
    found = json.dumps({"row": "a", "column": "training", "text": "1/s"})
    cells, trouble = gpu.collected([sys.executable, "-c", f"print('{found}'); raise SystemExit(3)"], seconds=60)
    assert len(cells) == 1
    assert trouble == "ended with code 3"


def test_the_time_of_a_part_is_divided_among_what_is_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = gpu.Clock(end=130.0, figures=3)
    assert clock.until() == 110.0
    now = 120.0  # the first took longer
    assert clock.until() == 125.0
    now = 140.0
    assert clock.until() == 140.0


def test_rounds_stop_when_the_time_is_over(small):
    case, model, _ = small
    calls = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        flowedit.measured(case, model, (), rounds=50, until=0.0)
    finally:
        handle.remove()
    assert len(calls) == 2 * flowedit.STEPS  # the warm-up and one round
