"""What the README shows of the shipped tokens: prompts that nobody picked, and how many are drawn right."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
from PIL import Image

from benchmarks.alignment_figures import EXACT, Found
from benchmarks.alignment_places import placed, plain
from benchmarks.alignment_rows import BASELINE, DEVELOPMENT, REPORTED, SEEDS, SOFTREPA, Placing, tokens_path
from benchmarks.smallworld import shown
from benchmarks.smallworld.measure import StockModel
from benchmarks.smallworld.study import is_for_development
from softrepa.smallworld.checkpoint import TOKENS
from softrepa.smallworld.world import Group, draw, plain_caption, random_scene
from tools import environment
from tools.pairs import COLOURS


def test_the_list_is_fixed_and_nothing_was_chosen_on_it():
    specs = shown.prompts()
    assert specs[:20] == shown.prompts(20)
    assert not any(map(is_for_development, specs))
    captions = list(map(plain_caption, specs))
    first = shown.first(specs)
    assert len(first) == shown.FIRST
    assert [captions.index(caption) for caption in first] == list(first.values()) == sorted(first.values())
    assert set(captions[: max(first.values())]) <= set(first)


def test_what_is_counted_is_what_is_drawn(tmp_path):
    text = shown.show(StockModel(tmp_path / "models"), tmp_path, 6, tmp_path / "shown.jpg")
    figures = json.loads((tmp_path / "shown.json").read_text(encoding="utf-8"))
    assert [len(figures[name]) for name in ("without", "with", "guided")] == [6] * 3
    assert text == shown.sentence(figures)
    with Image.open(tmp_path / "shown.jpg") as picture:
        assert picture.width > shown.COLUMNS * 2 * 192


def test_the_figures_that_come_with_the_repository():
    figures = json.loads((shown.FOLDER / "shown.json").read_text(encoding="utf-8"))
    assert (figures["prompts"], figures["cfg"], figures["guidance"]) == (shown.COUNT, shown.CFG, shown.GUIDANCE)
    assert [len(figures[name]) for name in ("without", "with", "guided")] == [shown.COUNT] * 3
    (without, alone), (with_tokens, alone_with) = (shown.counts(figures[name]) for name in ("without", "with"))
    readme = " ".join((environment.ROOT / "README.md").read_text(encoding="utf-8").split())
    said = f"Right of {shown.COUNT}: {without} without, {with_tokens} with; nothing else, {alone} and {alone_with}."
    assert said in readme
    found, tests = Found(), ("drawn again", "trained anew")
    tokens, plain_ones = ([f"{name}, cfg 1, {test}" for test in tests] for name in (SOFTREPA, BASELINE))
    for rows, text in ((tokens, "there for {} and {} of 480 prompts"), (plain_ones, "without tokens for {} and {} (")):
        assert text.format(*(f"{found.mean(row, EXACT):.0%}" for row in rows)) in readme
    assert f"alone reaches {found.mean(plain(shown.GUIDANCE, REPORTED), EXACT):.0%}" in readme
    changes = [found.change(*rows, EXACT) for rows in zip(tokens, plain_ones, strict=True)]
    ends = [f"{100 * (one.mean - one.half):+.1f} to {100 * (one.mean + one.half):+.1f}" for one in changes]
    means = [f"{100 * one.mean:+.1f}" for one in changes]
    assert f"({means[0]} points, {ends[0]}; {means[1]}, {ends[1]})" in readme
    (job,) = [job for job in placed(SOFTREPA, shown.CFG, Placing(), DEVELOPMENT).jobs() if job.seed == SEEDS]
    assert TOKENS.read_bytes() == tokens_path(job).read_bytes()  # the first run that is not reported on


def test_verdicts():
    spec = next(one for one in shown.prompts() if plain_caption(one) == "a square and a cross")
    rng = np.random.default_rng(0)
    more = replace(spec, groups=(*spec.groups, Group("circle")))
    less = replace(spec, groups=spec.groups[:1])
    drawn = [draw(random_scene(rng, one)) for one in (spec, more, less)]
    assert [shown.verdict(one, spec) for one in drawn] == ["right", "and more", "wrong"]
    assert shown.counts(["right", "and more", "wrong", "right"]) == (3, 2)


def test_the_demo_draws_and_reads_them(tmp_path):
    """As the README prints it."""
    command = [sys.executable, "-m", "tools.demo", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"is there in (\d+) and (\d+), and nothing else in (\d+) and (\d+); .* ([\d.]+) of 255", done.stdout
    )
    assert found, done.stdout
    assert float(found[5]) > 1  # a person sees it
    with Image.open(tmp_path / "small_world.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    all_there, alone = int(found[1]) + int(found[2]), int(found[3]) + int(found[4])
    expected = {"right": alone, "and more": all_there - alone, "wrong": 24 - all_there}
    for word, colour in COLOURS.items():
        mark = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert bool((pixels == mark).all(-1).any()) == (expected[word] > 0)
