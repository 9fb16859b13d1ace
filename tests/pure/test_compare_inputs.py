"""What a person types for a comparison: prompts, seeds, strengths, facts; and the grid that comes of it."""

import json

import numpy as np
import pytest
from comfyui_softrepa.softrepa.comparing.facts import Fact, as_question, parse_fact, parse_facts, whole
from comfyui_softrepa.softrepa.comparing.grid import draw_grid, wrapped
from comfyui_softrepa.softrepa.comparing.inputs import (
    MOST_SEEDS,
    Prompt,
    parse_prompts,
    parse_seeds,
    parse_strengths,
    read_prompts,
)
from comfyui_softrepa.softrepa.comparing.plan import GROUP, groups, plan, shown_of
from comfyui_softrepa.softrepa.comparing.records import Arm
from comfyui_softrepa.softrepa.errors import SoftREPAError
from PIL import ImageFont

ARMS = [Arm("strength 0"), Arm("strength 1")]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", [0]), (" 2,1 , 2", [2, 1]), ("8-10, 3", [8, 9, 10, 3]), (f"{2**64 - 1}", [2**64 - 1]), ("5-5", [5])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", ",", "a", "-1", "1.5", f"{2**64}", "3-2", f"0-{MOST_SEEDS}", "1-2-3", "١", "9" * 5000]
)
def test_seeds_that_are_none(text):
    with pytest.raises(SoftREPAError, match="seeds"):
        parse_seeds(text if text != "١" else "²")


@pytest.mark.parametrize(
    ("text", "strengths"), [("0, 1", [0, 1]), ("1,0.5,0", [0, 1, 0.5]), ("2, 1", [2, 1]), ("1, 1", [1])]
)
def test_strengths_with_the_plain_model_first(text, strengths):
    assert parse_strengths(text) == strengths


@pytest.mark.parametrize("text", ["", "a", "-0.1", "nan", "inf", "11", "0; 1"])
def test_strengths_that_are_none(text):
    with pytest.raises(SoftREPAError, match="strengths"):
        parse_strengths(text)


def test_prompts_end_where_a_file_ends_its_lines(tmp_path):
    """U+2028 and others, at which Python splits too, stand inside of texts."""
    texts = ["a\u2028cat", "a\x85dog"]
    for name, line in (("a.txt", "{}"), ("a.jsonl", '{{"prompt": "{}"}}')):
        (tmp_path / name).write_bytes("\r\n\n".join(map(line.format, texts)).encode())
        assert [one.text for one in read_prompts(tmp_path / name)] == texts


def test_prompts_are_lines():
    assert parse_prompts("\n a cat \r\n\n(a dog:1.2)\n") == [Prompt("a cat"), Prompt("(a dog:1.2)")]


def test_prompts_of_files(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("\ufeffa cat\n\nein größerer Hund\n", encoding="utf-8")
    assert [one.text for one in read_prompts(text)] == ["a cat", "ein größerer Hund"]
    rows = [
        {"prompt": "a cat"},
        {"prompt": "two dogs", "atom_count": 2, "vqa_list": [["How many dogs are there?", "two"]], "skills": []},
        {"prompt": "three", "facts": ["a black cat", "Is it day?"]},
    ]
    lines = tmp_path / "prompts.JSONL"
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_prompts(lines) == [
        Prompt("a cat"),
        Prompt("two dogs", (Fact("How many dogs are there?", "two"),)),
        Prompt("three", (Fact("Does this image show a black cat?"), Fact("Is it day?"))),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompt"),
        (b"{", "line 1 is no JSON"),
        (b"[]", 'expected an object with a text for "prompt"'),
        (b'{"prompt": 3}', 'expected an object with a text for "prompt"'),
        (b'{"prompt": "a", "facts": {"b": 1}}', "expected a list"),
        (b'{"prompt": "a", "facts": [["b", 3]]}', "a fact is"),
        (b'{"prompt": "a"}\n\n{"prompt": " a"}', 'says "a" twice'),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_files_that_are_none(tmp_path, content, said):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(SoftREPAError, match=said):
        read_prompts(path)
    with pytest.raises(SoftREPAError, match="cannot be read"):
        read_prompts(tmp_path / "gone.jsonl")


def test_facts():
    assert parse_facts("three cats; Is one black?;\n\na dog", ["a", "b"]) == [
        (Fact("Does this image show three cats?"), Fact("Is one black?")),
        (Fact("Does this image show a dog?"),),
    ]
    assert parse_facts(" ", ["a", "b"]) == [(), ()]
    assert whole("a cat").question == 'Does this image show "a cat"?'
    assert as_question("A cat is black. ") == "Does this image show A cat is black?"
    assert parse_fact(["Count the cats.", " two"], "") == Fact("Count the cats.", "two")
    with pytest.raises(SoftREPAError, match="facts has 1 lines, expected 2"):
        parse_facts("a cat", ["a", "b"])


def test_pairs_stand_together():
    records = plan(ARMS, ["a", "b"], [7, 8])
    assert [(one.prompt, one.seed, one.arm[-1]) for one in records][:3] == [(0, 7, "0"), (0, 7, "1"), (0, 8, "0")]
    assert [len(shown_of(records, 2, shown)) for shown in (1, 2, 3, 5, 100)] == [2, 2, 2, 4, 8]


def test_more_than_can_be_drawn_is_refused():
    with pytest.raises(SoftREPAError, match="200 prompts with 10,000 seeds in 2 arms are 4,000,000 pictures, expected"):
        plan(ARMS, [str(number) for number in range(200)], range(10_000))


def test_groups_are_small_whatever_is_left():
    records = plan(ARMS, [str(number) for number in range(3 * GROUP + 1)], [0, 1])
    for some in (records, [one for one in records if one.prompt % 2], records[:2], []):
        found = list(groups(some))
        assert [one for group in found for one in group] == some
        assert all(len({one.prompt for one in group}) <= GROUP for group in found)


def test_the_grid_has_prompts_down_arms_across_seeds_inside():
    records = plan(ARMS, ["a red circle", "b"], [0, 1])
    colours = {one: np.full((64, 64, 3), (index + 1) / 9, dtype=np.float32) for index, one in enumerate(records)}
    grid = np.asarray(draw_grid(records, colours.get))
    places = {}
    for one, pixels in colours.items():
        rows, columns = np.nonzero((grid == round(255 * float(pixels[0, 0, 0]))).all(-1))
        assert len(rows) >= 128 * 128
        places[one] = (np.median(rows), np.median(columns))
    assert sorted(records, key=lambda one: (one.prompt, one.arm, one.seed)) == sorted(records, key=places.get)


def test_the_grid_of_what_is_there_so_far():
    records = plan(ARMS, ["a"], [0])
    pixels = np.zeros((64, 64, 3), dtype=np.float32)
    empty, half, full = (
        np.asarray(draw_grid(records, {one: pixels for one in records[:count]}.get)) for count in (0, 1, 2)
    )
    assert empty.shape == half.shape == full.shape
    assert (empty == 0).all(-1).sum() < (half == 0).all(-1).sum() < (full == 0).all(-1).sum()


def test_the_grid_says_what_it_is_told():
    records = plan(ARMS, ["a"], [0])
    pixels = {one: np.ones((64, 64, 3), dtype=np.float32) for one in records}
    plain = draw_grid(records, pixels.get)
    told = draw_grid(records, pixels.get, "alignment\nstrength 0: 50%", {one.file: "50.0%" for one in records})
    assert told.height > plain.height
    assert told.width == plain.width


def test_large_pictures_get_small_and_small_ones_large():
    records = plan(ARMS, ["a"], [0])
    large = draw_grid(records, lambda one: np.ones((1024, 512, 3), dtype=np.float32))
    assert large.height < 400
    many = plan(ARMS, ["a"], range(40))
    assert draw_grid(many, lambda one: np.ones((256, 256, 3), dtype=np.float32)).width < 6000


def test_lines_fit():
    font = ImageFont.load_default(14)
    lines = wrapped("a very long prompt of many words " * 5 + "x" * 300, font, 150, 4)
    assert len(lines) == 4
    assert all(font.getlength(line) <= 150 for line in lines)
    assert lines[-1].endswith("...")
    assert wrapped("", font, 150, 4) == [""]
    assert "\u202e" not in "".join(wrapped("a\u202eb", font, 150, 4))
