"""The study of soft tokens: what is held out, what is a difference, what the report says of rows that were not run."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from softrepa_tests.conftest import ROOT

from benchmarks import alignment, alignment_figures, alignment_places, alignment_rows, alignment_tests
from benchmarks.alignment_figures import ALL_RIGHT, Found, derived, difference, shown
from benchmarks.alignment_places import GUIDANCES, placings
from benchmarks.alignment_places_report import places_section, together
from benchmarks.alignment_report import CATEGORIES, among, plot, report
from benchmarks.alignment_rows import BASELINE, CONTROL, LEARNED, ROWS, SOFTREPA, Job
from benchmarks.smallworld import study
from benchmarks.smallworld.tokens import CATEGORIES as TRAINED
from softrepa.smallworld.world import COLOURS, SHAPES, Group, Spec, draw, plain_caption, random_scene


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


def test_captions_wrong_by_a_number():
    assert study.other_numbers("a drawing of three red circles") == [
        "a drawing of two red circles",
        "a drawing of four red circles",
    ]
    assert len(study.other_numbers("two squares, one cross and four circles")) == 4
    assert study.other_numbers("one square left of a circle") == []


def test_settings_are_chosen_and_reported_on_other_captions():
    rng = np.random.default_rng(0)
    for name in CATEGORIES:
        sides = [
            {plain_caption(spec_of(rng, name)) for _ in range(60)}
            for spec_of in (study.development_spec, study.reported_spec)
        ]
        assert all(sides)
        assert not sides[0] & sides[1]


def test_the_distance_knows_what_it_compares():
    rng = np.random.default_rng(0)

    def scenes(*shapes):
        specs = [Spec((Group(shape, 2),)) for shape in shapes for _ in range(60)]
        return study.small(np.stack([draw(random_scene(rng, spec)) for spec in specs]))

    same = study.distance(scenes("circle", "cross"), scenes("circle", "cross"))
    blank = study.distance(scenes("circle", "cross") * 0 + 0.8, scenes("circle", "cross"))
    assert abs(same) < blank / 10


def test_differences_by_hand():
    found = difference({0: [1.0, 2.0], 1: [3.0, 2.0]}, {None: [0.0, 1.0]})  # 1 and 1, 3 and 1
    assert found.mean == pytest.approx(1.5)
    assert difference({0: [float("nan"), 2.0], 1: [float("nan"), 2.0]}, {None: [1.0, 1.0]}).mean == pytest.approx(1.0)
    alone = difference({0: [3.0, 2.0]}, {None: [1.0, 1.0]})  # one seed tells nothing of seeds
    assert (alone.mean, alone.half) == (1.5, float("inf"))
    assert not alone.beyond()
    assert difference({0: [1.0], 1: [1.0]}, {1: [1.0], 2: [1.0]}).half == float("inf")
    assert difference({0: [1.0]}, {1: [1.0]}) is None
    assert difference({0: [1.0], 1: [3.0]}, {1: [1.0], 0: [0.0], 2: [9.0]}).mean == pytest.approx(1.5)
    assert difference({}, {None: [1.0]}) is None
    runs = {0: [1.0, 3.0], 1: [2.0, 4.0]}
    assert difference(runs, {None: [0.0, 0.0]}, together(1)).half > 2 * difference(runs, {None: [0.0, 0.0]}).half


@pytest.mark.parametrize(("seeds", "seed_spread"), [(5, 0.1), (3, 0.1), (3, 0.0), (5, 0.0)])
def test_intervals_hold_what_they_should(seeds, seed_spread):
    """About 95% of differences lie in their intervals, which are not much wider than they have to be."""
    rng, held, widths = np.random.default_rng(1), 0, []
    pictures, picture_spread, rest = 60, 0.4, 0.2
    for _ in range(400):
        runs, columns = rng.normal(0, seed_spread, (seeds, 1)), rng.normal(0, picture_spread, (1, pictures))
        cells = 0.3 + runs + columns + rng.normal(0, rest, (seeds, pictures))
        found = difference(dict(enumerate(cells.tolist())), {None: [0.0] * pictures})
        held += abs(found.mean - 0.3) <= found.half
        widths.append(found.half)
    assert held / 400 >= 0.92
    if not seed_spread:  # then only pictures matter, and there are many
        assert statistics.median(widths) < 1.2 * 1.96 * (picture_spread**2 / pictures) ** 0.5 + 0.02


def test_pictures_of_one_caption_count_as_one():
    cells = np.array([[1.0, 1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0, 0.0]])
    groups = np.array(["a", "a", "b", "b", "c"])
    found = alignment_figures.of_groups(cells, groups)
    assert found.shape == (2, 3)
    assert found.mean(1) == pytest.approx(cells.mean(1))
    twice = alignment_figures.of_groups(np.repeat(cells, 2, axis=1), np.repeat(groups, 2))
    assert twice == pytest.approx(found)  # what is repeated says no more
    alone = alignment_figures.of_groups(cells, np.arange(5))
    assert alone == pytest.approx(cells)


def test_intervals_hold_where_captions_differ():
    """Of runs and captions of very different numbers of pictures."""
    rng, sizes, held, naive = np.random.default_rng(2), (40, 20, *[5] * 20, *[1] * 40), 0, 0
    groups = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    for _ in range(300):
        captions = np.repeat(rng.normal(0, 0.3, len(sizes)), sizes)
        cells = 0.2 + rng.normal(0, 0.02, (5, 1)) + captions + rng.normal(0, 0.5, (5, len(groups)))
        ones, zero = dict(enumerate(cells.tolist())), {None: [0.0] * len(groups)}
        for of, name in ((groups, "held"), (None, "naive")):
            found = difference(ones, zero, groups=of)
            if abs(found.mean - 0.2) <= found.half:
                held, naive = held + (name == "held"), naive + (name == "naive")
    assert held / 300 >= 0.90
    assert naive < held - 30


def test_which_figures_belong_together():
    found = alignment_tests.groups("reported", ("right",), 480)
    assert len(set(found)) == alignment_tests.distinct("reported") < 300
    assert len(alignment_tests.groups("reported", ("right", "counting"), 80)) == 80
    assert all(" " in caption for caption in alignment_tests.groups("everything", ("too_many",), 40))
    assert alignment_tests.groups("everything", ("retrieval",), 8) == ["0"] * 4 + ["1"] * 4
    with pytest.raises(ValueError, match="5 figures of right/colours, expected one of each of 80 prompts"):
        alignment_tests.groups("reported", ("right", "colours"), 5)


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A folder for results that are made up, of fewer pictures than there are prompts."""
    monkeypatch.setattr(alignment_rows, "RESULTS", tmp_path)
    monkeypatch.setattr(alignment_figures, "groups", lambda test, of, count: None)
    return tmp_path


def write(job: Job, shift: float) -> None:
    rng = random.Random(job.seed)

    def figures(count):
        return [min(1.0, rng.random() + shift) for _ in range(count)]

    by_category = {name: figures(4) for name in CATEGORIES}
    facts = {name: [*figures(20), *[float("nan")] * 4] for name in CATEGORIES}
    single = {name: figures(24) for name in ("clean", "loss", "retrieval", "hard_retrieval")}
    single |= {"surplus": [rng.choice((-1, 0, 1)) for _ in range(4)], "margin": figures(24), "unasked": [0] * 24}
    made = {"device": job.device, "torch": "made-up"}
    result = {"right": by_category, "facts": facts, "distance": shift, "made": made, **single}
    alignment_rows.result_path(job).write_text(json.dumps(result), encoding="utf-8")


def test_the_report(made_up, tmp_path, monkeypatch):
    text = report(Found())
    assert text.count("not run") >= len(ROWS) - 3
    for name, shift in ((BASELINE, 0.0), (SOFTREPA, 0.5), (CONTROL, 0.0)):
        for job in ROWS[name].jobs():
            write(job, shift)
    text = report(Found())
    (line,) = (line for line in text.splitlines() if line.startswith("| prompts drawn right |"))
    assert line.count("**") >= 4  # better than both others
    assert f"{SOFTREPA} (5 runs)" in text
    plot(Found(), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert len(picture.getcolors(2**20)) > 10
    monkeypatch.setattr(alignment_rows, "STEPS", alignment_rows.STEPS + 1)
    assert f"{SOFTREPA} (0 runs)" in report(Found())  # other settings, other results


PARENT = """
import multiprocessing, os, time
from benchmarks.alignment import end_with_parent

def work():
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    time.sleep(600)
"""


def test_a_worker_ends_with_its_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf-8")
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=there) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
        try:
            parent.communicate(timeout=60)  # what the worker would say is over when it is
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGTERM)
            raise


def test_rows_are_compared_among_themselves(made_up):
    part = alignment_rows.CONFIRMED_PART
    shifts = {SOFTREPA: 0.0, alignment_rows.BOTH: 0.5, LEARNED: 0.1}
    for name, shift in shifts.items():
        for job in ROWS[f"{name}, cfg 1, trained anew"].jobs():
            write(job, shift)
    lines = [line.strip("| ").split(" | ") for line in among(Found(), part) if " - " in line]
    both, softrepa, learned = (f"{name}, cfg 1, trained anew" for name in (alignment_rows.BOTH, SOFTREPA, LEARNED))
    assert {cells[0]: cells[-1].split(" ")[0].strip("*") for cells in lines} == {
        f"{both} - {softrepa}": "+0.5000",
        f"{learned} - {softrepa}": "+0.1000",
        f"{learned} - {both}": "-0.4000",
    }


def test_kept_results_are_of_rows_that_are_there():
    """What was measured is found again: the names of its files are what they were."""
    trained = [row.name for row in ROWS.values() if row.has_own_tokens]
    rows = [*ROWS.values(), *(row for name in trained for row in places_rows(name))]
    jobs = [job for row in rows for device in alignment_rows.DEVICES for job in row.jobs(device)]
    assert {path.stem for path in alignment_rows.RESULTS.glob("*.json")} <= {job.key for job in jobs}
    trained_as = {job.trained_as for job in jobs if job.row.training is not None}
    assert {path.stem for path in alignment_rows.TOKENS.glob("*.safetensors")} <= trained_as


def places_rows(like):
    for cfg in GUIDANCES:
        for test in (alignment_rows.DEVELOPMENT, alignment_rows.REPORTED):
            yield alignment_places.plain(cfg, test)
            yield from (alignment_places.placed(like, cfg, one, test) for one in placings(cfg))


def test_what_decides_a_figure_is_in_its_name():
    rows = [*ROWS.values(), *places_rows(SOFTREPA)]
    jobs = [job for row in rows for device in alignment_rows.DEVICES for job in row.jobs(device)]
    decides = {
        (job.row.cfg, job.row.test, job.row.placing, job.device, None if job.row.training is None else job.trained_as)
        for job in jobs
    }
    assert len({job.key for job in jobs}) == len(decides) > 500
    trained = {(job.seed, job.device): job.trained_as for job in jobs if job.row.like == SOFTREPA}
    # runs that are reported on, what settings are chosen with, and new ones
    runs = 2 * alignment_rows.SEEDS + alignment_places.RUNS
    assert len(set(trained.values())) == len(trained) == 2 * runs
    assert trained[0, "cpu"] == ROWS[SOFTREPA].jobs()[0].trained_as
    numbers = ROWS[alignment_rows.OTHER_NUMBERS]
    swaps = replace(numbers, wrong_by=alignment_rows.SWAPS)
    assert Job(numbers, 0).trained_as != Job(swaps, 0).trained_as
    again = ROWS[f"{numbers.name}, counting"].jobs()[0]
    assert (again.wrong_by, again.trained_as) == (alignment_rows.NUMBERS, Job(numbers, 0).trained_as)


def test_the_best_of_each_guidance_is_reported(made_up):
    rows = [row for row in alignment_places.development_rows(SOFTREPA, 2.0) if row.training is not None]
    assert not alignment_places.reported_rows(Found(), SOFTREPA, 2.0)
    for row in rows:
        for job in row.jobs()[: -1 if row is rows[-1] else None]:
            write(job, 0.3 if row is rows[4] else 0.1)
    assert not alignment_places.reported_rows(Found(), SOFTREPA, 2.0)  # one run is missing
    write(rows[-1].jobs()[-1], 0.1)
    plain, best = alignment_places.reported_rows(Found(), SOFTREPA, 2.0)
    assert (plain.cfg, plain.training, plain.test) == (2, None, "reported")
    assert (best.cfg, best.placing, best.test) == (2, rows[4].placing, "reported")
    seeds = {job.seed for row in rows for job in row.jobs()}
    assert not seeds & {job.seed for job in best.jobs()}
    assert not alignment_places.reported_rows(Found("cuda"), SOFTREPA, 2.0)


def test_the_report_of_the_places(made_up):
    rows = alignment_places.development_rows(SOFTREPA, 2.0)
    for row in rows:
        for job in row.jobs():
            write(job, 0.3 if row is rows[5] else 0.0)
    (line,) = (line for line in places_section() if "chosen |" in line)
    assert line.startswith(f"| {rows[5].placing.title} | not run | not run | not run | +")
    plain, best = alignment_places.reported_rows(Found(), SOFTREPA, 2.0)
    for row in (plain, best):
        for job in row.jobs():
            write(job, 0.5 if row.training is not None else 0.0)
    for job in rows[1].jobs("cuda"):
        write(job, 0.0)
    lines = places_section()
    (line,) = (line for line in lines if line.startswith(f"| 2 | {rows[5].placing.title} | 5 |"))
    assert line.count("**") == 2  # what is corrected, and nothing else
    assert shown(Found().change(best, plain, ALL_RIGHT, together(2)), ALL_RIGHT) in line  # SoftREPA on two devices
    assert sum(line.startswith("| 1 | not chosen yet | not run |") for line in lines) == 2
    assert [line[4:] for line in lines if line.startswith("### ")] == [
        f"{SOFTREPA}, drawn on {device} by PyTorch made-up" for device in alignment_rows.DEVICES
    ]


def test_what_earlier_results_lack_is_not_recorded(made_up):
    for job in ROWS[BASELINE].jobs() + ROWS[SOFTREPA].jobs()[:2]:
        write(job, 0.0)
    lines = {line.split(" | ")[0][2:]: line for line in report(Found()).splitlines() if line.startswith("| ")}
    assert "not recorded" not in lines["counting: too many"]
    for job in ROWS[SOFTREPA].jobs()[:2]:
        path = alignment_rows.result_path(job)
        result = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({name: result[name] for name in result if name != "surplus"}), encoding="utf-8")
    lines = {line.split(" | ")[0][2:]: line for line in report(Found()).splitlines() if line.startswith("| ")}
    assert lines["counting: too many"].split(" | ")[2:4] == ["not recorded", "not run"]
    assert "not recorded" not in lines["unclear verdicts"]


def test_what_is_asked_once_more_is_new():
    confirmed, reported = (alignment_tests.specs(name) for name in (alignment_rows.CONFIRMED, alignment_rows.REPORTED))
    for category in alignment_tests.FRESH:
        captions = [plain_caption(spec) for name, spec in confirmed if name == category]
        assert len(captions) == 80
        assert not set(captions) & alignment_tests.asked_before()
    # elsewhere captions come as often as in any other test: a third of the numbers name no colour
    counting = Counter(plain_caption(spec) for name, spec in confirmed if name == "counting")
    assert max(counting.values()) <= 20
    noise = {name: alignment_tests.asked(name).noise for name in alignment_rows.TESTS}
    assert noise == dict.fromkeys(noise, 0) | {"development": 3000, "reported": 4000, "confirmed": 5000}
    assert len(confirmed) == len(reported) == 480  # at one picture a seed of noise, these do not meet
    seeds = [job.seed for job in ROWS[f"{SOFTREPA}, cfg 1, trained anew"].jobs()]
    assert seeds == [7, 8, 9, 10, 11]
    chosen_with = {job.seed for row in places_rows(SOFTREPA) if row.training is not None for job in row.jobs()}
    assert not chosen_with & set(seeds)


def test_what_lacks_a_figure_is_measured_again_where_that_is_asked(made_up):
    one, other = ROWS[SOFTREPA].jobs()[:2]
    assert not alignment.is_measured(one, again=False)
    write(one, 0.0)
    assert alignment.is_measured(one, again=False)
    assert alignment.is_measured(one, again=True)
    alignment_rows.result_path(other).write_text('{"right": {}}', encoding="utf-8")
    assert alignment.is_measured(other, again=False)
    assert not alignment.is_measured(other, again=True)


def test_figures_that_follow_from_a_result():
    result = {"surplus": [2, 0, -1], "margin": [0.01, 0.2, 1], "right": {"counting": [1, 1, 0]}}
    assert derived(result) == {
        "too_many": [1, 0, 0],
        "too_few": [0, 0, 1],
        "unclear": [1, 0, 0],
        "clearly_right": [0, 1, 0],
    }
    assert derived({}) == {}
