"""Every benchmark of real model sizes in its smallest form, and the one command for all of them."""

import json
import subprocess
import sys
import time

import pytest
import torch
from comfyui_softrepa.softrepa.comfy.training.run import outside_inference
from softrepa_tests.conftest import ROOT
from softrepa_tests.sampling import relative_error

from benchmarks import flowedit, gpu, memory, ranks, sampling, training
from benchmarks.cases import build, soft_tokens
from benchmarks.reference import Reference
from softrepa.comfy.training.trainable import TrainableNetwork
from softrepa.training.ranks import ALONE
from softrepa.training.trainer import TrainableTokens, Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small():
    """A small case with its model and its tokens; tests/long and the training command below run the other families."""
    case = gpu.SMALL_CASES[0]
    model = build(case, CPU, torch.float32)
    with torch.inference_mode():
        return case, model, soft_tokens(case, model)


def test_sampling(small):
    steps = sampling.measured(*small, rounds=1)
    assert steps.plain > 0
    assert list(steps.ratios) == ["plain again", "strength 1", "strength 0.5", "strength 0"]


def test_flowedit(small):
    case, model, _ = small
    steps = flowedit.measured(case, model, ("two", "four"), rounds=1)
    assert steps.plain > 0
    assert list(steps.ratios) == ["two", "four"]


def test_training(small):
    figures = training.compared(*small, count=2, rounds=1)
    assert list(figures) == [way.title for way in training.WAYS]
    assert [one.at_once for one in figures.values()] == [4, 2, 4, 2, 1, 4, 4, 1]
    assert all(one.pairs_a_second > 0 for one in figures.values())
    assert figures[training.ONE_GRAPH.title].ratio == 1


def test_ways_without_memory_are_left_out(small, monkeypatch):
    """The speed of the others is then over that of the first that has some."""
    monkeypatch.setattr(training.Reference, "one_graph", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    figures = training.compared(*small, count=2, rounds=1, ways=training.WAYS[:3])
    assert figures.pop(training.ONE_GRAPH.title) is None
    assert figures[training.BY_ROW.title].ratio == 1


@pytest.mark.parametrize("way", training.WAYS, ids=lambda way: way.title)
def test_all_ways_compute_the_same_gradient(small, way):
    case, model, start = small
    with outside_inference():
        tokens, step = TrainableTokens(start), training.batch(case, 3)
        network = TrainableNetwork(model, start.blocks)
        reference = Reference(network)
        reference.feed(step)
        found = []
        for one in (training.ALL_AT_ONCE, way):
            tokens.zero_grad()
            one.step({True: network, False: network}, reference, tokens, step)[0]()
            found.append(torch.cat([parameter.grad.flatten() for parameter in tokens.parameters()]))
    assert relative_error(found[1], found[0]) <= 1e-4


def test_ranks(small):
    case, _, _ = small
    (found,) = ranks.measured(case, 2, 2, 1, CPU, ALONE)
    assert found.alone > 0
    assert "/s" in ranks.line(case, [found], 4)


def test_the_steps_of_other_objectives(small, monkeypatch):
    trained, step = [], Trainer.step

    def noted(self, micro_batch):
        trained.append((self.config.objective, self.config.guidance_weight))
        return step(self, micro_batch)

    monkeypatch.setattr(Trainer, "step", noted)
    figures = training.compared(*small, count=2, rounds=1, ways=training.OBJECTIVES)
    assert list(figures) == ["paper", "AGSM", "guidance", "paper and guidance", "guided contrast"]
    objectives = [("contrastive", 0), ("agsm", 0), ("guidance", 0), ("contrastive", 10), ("guided contrast", 0)]
    assert trained == 2 * objectives  # to warm up, and a round
    assert figures["paper"].ratio == 1
    assert all(one.pairs_a_second > 0 and one.at_once for one in figures.values())


def test_the_training_command():
    done = command("--small", "--batches", "2,3", "--rounds", "1", "--only", "SD3", module="training")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("B = ")]
    assert [line[8:38].strip() for line in lines] == 2 * [way.title for way in training.WAYS]
    assert "out of memory" not in done.stdout


def test_the_count_of_bytes():
    done = command("--doubles", "1", "--singles", "1", "--size", "128", module="memory")
    assert done.returncode == 0, done.stderr
    cells = [line.split("|")[1:3] for line in done.stdout.splitlines() if line.startswith("| ")]
    weights, kept, most, resident, half, offloaded = (float(found) for _, found in cells[1:])
    assert weights == 0.55  # 2 x 170M in the double block, 142M in the single one, 64M in all else
    assert 0 < kept < most < 0.25  # in which is the largest layer in bfloat16, 0.13
    assert offloaded < half < resident
    assert resident == pytest.approx(weights + most, abs=0.02)


def test_bytes_are_counted_while_a_tensor_lives():
    with memory.counting() as counter:
        first = torch.ones(1000, device="meta")
        second = first + 1
        del first
        view = second.view(10, 100)
        assert (counter.now, counter.most) == (4000, 8000)
        del second
        third = torch.ones(3000, device="meta")
        assert (counter.now, counter.most) == (16000, 16000)
        del view, third
        assert (counter.now, counter.most) == (0, 16000)


def command(*arguments: str, module: str = "gpu") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_figure_that_fails_leaves_the_next(small, capsys):
    def broken():
        yield gpu.Cell("a", "training", "1/s")
        raise ValueError("no kernel")

    cells = list(gpu.or_failed(small[0], ["training", "checkpoints"], broken()))
    assert [cell.text for cell in cells] == ["1/s", gpu.FAILED, gpu.FAILED]
    assert "no kernel" in capsys.readouterr().err


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
