"""The study of soft tokens: what is held out, what is a difference, what the report says of rows that were not run."""

import json
import random
import statistics

import numpy as np
import pytest

from benchmarks import alignment
from benchmarks.alignment import BASELINE, CATEGORIES, CONTROL, ROWS, SOFTREPA, Found, Job, difference, report
from benchmarks.smallworld import study
from benchmarks.smallworld.tokens import CATEGORIES as TRAINED
from benchmarks.smallworld.world import COLOURS, SHAPES, Group, Spec, draw, random_scene


def test_what_is_held_out():
    coloured = [Spec((Group(shape, colour=colour),)) for shape in SHAPES for colour in COLOURS]
    counted = [Spec((Group(shape, count),)) for shape in SHAPES for count in (2, 3, 4)]
    pairs = [Spec((Group(a), Group(b))) for a in SHAPES for b in SHAPES if a < b]
    assert [sum(map(study.is_held_out, kind)) for kind in (coloured, counted, pairs)] == [7, 3, 2]
    assert study.is_held_out(Spec((Group("square"), Group("cross")), "left of"))
    assert not any(study.is_held_out(Spec((Group(shape),))) for shape in SHAPES)


def test_training_and_test_say_different_things():
    rng = np.random.default_rng(0)
    trained = [study.training_spec(rng, category) for category in TRAINED for _ in range(50)]
    tested = {name: [study.test_spec(rng, name) for _ in range(50)] for name in CATEGORIES}
    assert not any(map(study.is_held_out, trained))
    for name, specs in tested.items():
        assert all(map(study.is_held_out, specs)) == (name != "single_object")


def test_the_distance_knows_what_it_compares():
    rng = np.random.default_rng(0)

    def scenes(*shapes):
        specs = [Spec((Group(shape, 2),)) for shape in shapes for _ in range(60)]
        return study.small(np.stack([draw(random_scene(rng, spec)) for spec in specs]))

    same = study.distance(scenes("circle", "cross"), scenes("circle", "cross"))
    blank = study.distance(scenes("circle", "cross") * 0 + 0.8, scenes("circle", "cross"))
    assert abs(same) < blank / 10


def test_differences_by_hand():
    found = difference([[1.0, 2.0], [3.0, 2.0]], [[0.0, 1.0]])
    assert found.mean == pytest.approx(1.5)
    by_seed, by_picture = statistics.variance([1.0, 2.0]) / 2, statistics.variance([2.0, 1.0]) / 2
    assert found.half == pytest.approx(12.706 * (by_seed + by_picture) ** 0.5)
    assert not found.beyond()
    assert difference([[float("nan"), 2.0]] * 3, [[float("nan"), 1.0]]).mean == pytest.approx(1.0)
    assert difference([[1.0]], [[1.0]]) is None  # one seed tells nothing of seeds
    assert difference([], [[1.0]]) is None


@pytest.mark.parametrize("gain", [0.0, 0.3])
def test_intervals_hold_what_they_should(gain):
    """Of differences drawn with a spread over seeds and over pictures, nearly all lie in their intervals."""
    rng, held = random.Random(1), 0
    for _ in range(200):
        seeds, pictures = ([rng.gauss(0, 0.1) for _ in range(count)] for count in (5, 40))
        ones = [[gain + seed + picture + rng.gauss(0, 0.3) for picture in pictures] for seed in seeds]
        found = difference(ones, [[0.0] * 40])
        held += abs(found.mean - gain) <= found.half
    assert held >= 185


def write(job: Job, shift: float) -> None:
    rng = random.Random(job.seed)

    def figures(count):
        return [min(1.0, rng.random() + shift) for _ in range(count)]

    by_category = {name: figures(4) for name in CATEGORIES}
    facts = {name: [*figures(20), *[float("nan")] * 4] for name in CATEGORIES}
    single = {name: figures(24) for name in ("clean", "loss", "retrieval", "hard_retrieval")}
    result = {"right": by_category, "facts": facts, "distance": shift, **single}
    alignment.result_path(job).write_text(json.dumps(result), encoding="utf-8")


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "RESULTS", tmp_path)
    text = report(Found())
    assert text.count("not run") >= len(ROWS) - 3
    for name, shift in ((BASELINE, 0.0), (SOFTREPA, 0.5), (CONTROL, 0.0)):
        for job in ROWS[name].jobs():
            write(job, shift)
    text = report(Found())
    (line,) = (line for line in text.splitlines() if line.startswith("| prompts drawn right"))
    assert line.count("**") >= 4  # better than both others
    assert f"{SOFTREPA} (5 runs)" in text
    monkeypatch.setattr(alignment, "STEPS", alignment.STEPS + 1)
    assert f"{SOFTREPA} (0 runs)" in report(Found())  # other settings, other results


def test_rows_differ_by_what_decides_them():
    keys = [job.key for row in ROWS.values() for job in row.jobs()]
    assert len(set(keys)) == len(keys)
    guided = ROWS[f"{SOFTREPA}, cfg 3"].jobs()[0]
    assert guided.trained_as == ROWS[SOFTREPA].jobs()[0].trained_as
    assert guided.key != ROWS[SOFTREPA].jobs()[0].key
