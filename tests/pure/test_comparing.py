"""Compared pictures on disk, and what is said of their scores."""

import math

import numpy as np
import pytest
from comfyui_softrepa.softrepa.comparing import records
from comfyui_softrepa.softrepa.comparing.records import Arm, record
from comfyui_softrepa.softrepa.comparing.summary import COLUMNS, Judged, as_rows, as_text, summarize
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.statistics import Unit

TEXTS = ("a red circle", "zwei Kreise: größer als \U0001f600?", "x" * 300, "../..", "")
PLAIN, WITH = Arm("strength 0", {"steps": 20}), Arm("strength 1", {"steps": 20, "tokens": "abc"})


def pictures(prompts=2, seeds=2, arms=(PLAIN, WITH)):
    return [
        record(arm, prompt, f"prompt {prompt}", seed)
        for prompt in range(prompts)
        for seed in range(seeds)
        for arm in arms
    ]


def test_a_file_has_a_name_of_its_own_on_every_system():
    names = [record(arm, 0, text, seed).file for arm in (PLAIN, WITH) for text in TEXTS for seed in (0, 2**64 - 1)]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        folder, file = name.split("/")
        assert name.isascii()
        assert len(file) < 80
        assert not set(file) & set('<>:"\\|?*')
        assert folder[0] not in ". "


def test_a_file_is_known_by_what_it_was_drawn_from():
    assert record(PLAIN, 0, "a", 1).file == record(PLAIN, 7, "a", 1).file  # wherever in the list the prompt stands
    other = Arm("strength 0", {"steps": 21})
    assert len({record(arm, 0, text, seed).file for arm, text, seed in [
        (PLAIN, "a", 1), (PLAIN, "b", 1), (PLAIN, "a", 2), (WITH, "a", 1), (other, "a", 1),
    ]}) == 5  # fmt: skip


def test_pictures_return(tmp_path):
    one, pixels = record(PLAIN, 0, "größer", 3), np.random.default_rng(0).random((4, 5, 3), dtype=np.float32)
    assert not records.is_drawn(tmp_path, one)
    records.write_picture(tmp_path, one, pixels)
    assert records.is_drawn(tmp_path, one)
    assert np.abs(records.read_picture(tmp_path, one) - pixels).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n", b"no picture"])
def test_a_broken_picture_is_named(tmp_path, content):
    one = record(PLAIN, 0, "a", 0)
    if content is not None:
        (tmp_path / one.file).parent.mkdir()
        (tmp_path / one.file).write_bytes(content)
    with pytest.raises(SoftREPAError, match=r"a-.*_0\.png cannot be read .*delete the file"):
        records.read_picture(tmp_path, one)


def test_tables_return(tmp_path):
    all_of_them = [record(PLAIN, number, text, 3) for number, text in enumerate([*TEXTS, 'a "b", c\nd'])]
    records.write_records(tmp_path, all_of_them)
    assert records.read_records(tmp_path) == all_of_them
    path, scores = records.scores_path(tmp_path, "CLIP: ViT/L"), {"a/b.png": 0.1, "c.png": -1e-9}
    assert path.parent == tmp_path / "scores"
    assert records.read_scores(path) == {}
    records.write_scores(path, scores)
    assert records.read_scores(path) == scores


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file,score\na.png,nan\n", "line 2: score is nan, expected a finite number"),
        ("file,score\na.png,high\n", "line 2: score is high"),
        ("file,score\na.png\n", "expected the columns file, score"),
        ("name,score\na.png,1\n", "expected the columns file, score"),
        ("", "is no table"),
        ("\udcff", "is no table"),
    ],
)
def test_a_broken_table_is_refused(tmp_path, content, said):
    path = tmp_path / "scores.csv"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(SoftREPAError, match=said):
        records.read_scores(path)


def test_a_list_without_numbers_is_refused(tmp_path):
    with pytest.raises(SoftREPAError, match="No such file"):
        records.read_records(tmp_path)
    (tmp_path / records.PICTURES).write_text("arm,prompt,seed,text,file\na,one,2,b,c\n", encoding="utf-8")
    with pytest.raises(SoftREPAError, match="line 2: prompt and seed are"):
        records.read_records(tmp_path)


def judged(of):
    return Judged("drawn right", Unit(percent=True), {one.file: of(one) for one in pictures()}, "the checker's")


def test_a_summary_by_hand():
    plain, other = summarize(pictures(), judged(lambda one: float(one.arm == "strength 1" and one.prompt == 1)))
    assert (plain.mean, plain.difference, other.mean) == (0.0, None, 0.5)
    assert (other.difference.mean, other.pictures, other.prompts) == (0.5, 4, 2)
    assert as_text([plain, other]).splitlines()[:2] == ["drawn right (the checker's)", "strength 0: 0.0%"]
    assert "strength 1: 50.0%, +50.0 points (-585.3 to +685.3): nothing can be said from 4 pairs" in as_text(
        [plain, other]
    )
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in as_rows([plain, other])]
    assert rows[0]["difference"] == ""
    assert rows[1]["low"] == pytest.approx(0.5 - other.difference.half)
    assert rows[1]["prompts_needed"] == other.difference.needed()


def test_a_summary_of_what_is_there_so_far():
    """A prompt's pictures count as one, also where some of them are missing."""
    scores = {one.file: float(one.seed) for one in pictures() if one.prompt == 0 or one.seed == 1}
    plain, other = summarize(pictures(), Judged("judge", Unit(), scores))
    assert plain.mean == pytest.approx((0.5 + 1) / 2)
    assert (other.pictures, other.difference.pictures) == (3, 3)
    only_plain = {one.file: 1.0 for one in pictures() if one.arm == "strength 0"}
    assert [line.arm for line in summarize(pictures(), Judged("judge", Unit(), only_plain))] == ["strength 0"]
    apart = {one.file: 1.0 for one in pictures() if (one.arm == "strength 0") == (one.seed == 0)}
    assert summarize(pictures(), Judged("judge", Unit(), apart))[1].difference is None
    assert summarize(pictures(), Judged("judge", Unit(), {})) == []


def test_one_prompt_leaves_its_interval_empty():
    few = pictures(prompts=1)
    lines = summarize(few, Judged("judge", Unit(), {one.file: float(one.seed) for one in few}, less_is_better=True))
    assert as_rows(lines)[1][6:9] == ["", "", ""]
    assert not math.isfinite(lines[1].difference.half)
    assert as_text(lines).startswith("judge (less is better)\n")
