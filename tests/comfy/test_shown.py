"""What the README shows of the shipped tokens: prompts that nobody picked, and how many are drawn right."""

import json
import re
import subprocess
import sys

import numpy as np
from PIL import Image

from benchmarks.alignment_figures import Found
from benchmarks.alignment_places import chosen, placed
from benchmarks.alignment_rows import DEVELOPMENT, HIGH, SEEDS, Placing, tokens_path
from benchmarks.smallworld import shown
from benchmarks.smallworld.measure import StockModel
from benchmarks.smallworld.study import is_for_development
from softrepa.smallworld.checkpoint import TOKENS
from softrepa.smallworld.world import plain_caption
from tools import environment


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
    text = shown.show(StockModel(tmp_path / "models"), tmp_path, count=6)
    figures = json.loads((tmp_path / "shown.json").read_text(encoding="utf-8"))
    assert [len(figures[name]) for name in ("without", "with", "guided")] == [6] * 3
    assert text == shown.sentence(figures)
    with Image.open(tmp_path / "shown.png") as picture:
        assert picture.width > shown.COLUMNS * 2 * 192


def test_the_figures_that_come_with_the_repository():
    figures = json.loads((shown.FOLDER / "shown.json").read_text(encoding="utf-8"))
    assert (figures["prompts"], figures["cfg"], figures["strength"]) == (shown.COUNT, shown.CFG, shown.STRENGTH)
    readme = " ".join((environment.ROOT / "README.md").read_text(encoding="utf-8").split())
    counts = [sum(figures[name]) for name in ("without", "with", "guided")]
    assert "of {} prompts it draws {} right without tokens and {} with them".format(shown.COUNT, *counts) in readme
    assert chosen(Found(), HIGH, shown.CFG) == Placing(shown.STRENGTH)
    (job,) = [job for job in placed(HIGH, shown.CFG, Placing(shown.STRENGTH), DEVELOPMENT).jobs() if job.seed == SEEDS]
    assert TOKENS.read_bytes() == tokens_path(job).read_bytes()  # the first run that settings were chosen with


def test_the_demo_draws_and_reads_them(tmp_path):
    """As the README prints it."""
    command = [sys.executable, "-m", "tools.demo", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"12 prompts, .*: right without (\d+), with (\d+); mean pixel change ([\d.]+) of 255", done.stdout
    )
    assert found, done.stdout
    assert float(found[3]) > 2  # a person sees it
    with Image.open(tmp_path / "small_world.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    marks = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in ("#1a7f37", "#c0392b")]
    seen = [bool((pixels == mark).all(-1).any()) for mark in marks]
    assert seen == [int(found[1]) + int(found[2]) > 0, int(found[1]) + int(found[2]) < 24]
