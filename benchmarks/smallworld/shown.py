"""What the shipped tokens do: a fixed list of prompts, drawn without and with them and read by the checker."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from softrepa.files import write_atomically
from softrepa.smallworld.checkpoint import TOKENS
from softrepa.smallworld.world import CATEGORIES, Spec, plain_caption
from tools.pairs import COLOURS, Pair, sheet

from . import checker
from .measure import StockModel, replace_text
from .study import pictures, reported_spec

COUNT, FIRST = 200, 12
"""Prompts that are counted, and those of them, the first different ones, whose pictures are shown."""
COLUMNS = 4
SEED, NOISE = 4100, 9000
CFG, GUIDANCE = 1.0, 2.0
"""Without guidance, where tokens act most; and the guidance that the model is otherwise drawn with."""
NAME, FOLDER = "shown", Path(__file__).with_name("results")
PICTURE = Path(__file__).parents[2] / "nodes" / "web" / "docs" / "SoftREPASmallWorldPrompts.jpg"
"""The README's."""
SIDES = ("without", "with")
RIGHT, AND_MORE, WRONG = COLOURS


def prompts(count: int = COUNT) -> list[Spec]:
    """The first of a fixed list, the categories in turn.

    Nothing was chosen on their captions, and they say what no training caption says, but for single objects.
    """
    rng = np.random.default_rng(SEED)
    return [reported_spec(rng, CATEGORIES[i % len(CATEGORIES)]) for i in range(count)]


def first(specs: list[Spec]) -> dict[str, int]:
    """Captions of the first different ones, and where they stand."""
    places = {plain_caption(spec): i for i, spec in reversed([*enumerate(specs)])}
    return dict(sorted(places.items(), key=lambda one: one[1])[:FIRST])


def show(stock: StockModel, into: Path, count: int = COUNT, picture: Path = PICTURE) -> str:
    """Draws, counts and writes; returns what stands below the picture."""
    from softrepa.comfy.tokens.patching import apply_tokens
    from softrepa.token_files import load

    specs = prompts(count)
    arms = {
        "without": (stock.model, CFG),
        "with": (apply_tokens(stock.model, load(TOKENS)), CFG),
        "guided": (stock.model, GUIDANCE),
    }
    drawn = {name: pictures(stock, model, cfg, specs, NOISE) for name, (model, cfg) in arms.items()}
    verdicts = {name: [verdict(*one) for one in zip(ones, specs, strict=True)] for name, ones in drawn.items()}
    captions = list(map(plain_caption, specs))
    pairs = [
        Pair(caption, tuple(as_picture(drawn[name][i]) for name in SIDES), tuple(verdicts[name][i] for name in SIDES))
        for caption, i in first(specs).items()
    ]
    figures = {"prompts": count, "captions": len(set(captions)), "cfg": CFG, "guidance": GUIDANCE} | verdicts
    text = sentence(figures)
    replace_text(into / f"{NAME}.json", json.dumps(figures, separators=(",", ":")) + "\n")
    shown = sheet(pairs, COLUMNS, text)
    write_atomically(picture, lambda temporary: shown.save(temporary, format="jpeg", quality=60, optimize=True))
    return text


def verdict(picture: np.ndarray, spec: Spec) -> str:
    """One of `tools.pairs.COLOURS`."""
    things = checker.find(picture)
    if not all(checker.facts(things, spec).values()):
        return WRONG
    return AND_MORE if checker.unasked(things, spec) else RIGHT


def counts(verdicts: list[str]) -> tuple[int, int]:
    """How many show all that is asked, and how many of these nothing else."""
    return len(verdicts) - verdicts.count(WRONG), verdicts.count(RIGHT)


def sentence(figures: dict) -> str:
    """Two lines, of figures as `show` writes them."""
    (without, only_without), (with_tokens, only_with), (guided, only_guided) = (
        counts(figures[name]) for name in ("without", "with", "guided")
    )
    return (
        f"{figures['prompts']} prompts of a fixed list, without guidance. "
        f"All that is asked is there: {without} without tokens, {with_tokens} with them.\n"
        f"That and nothing else: {only_without} and {only_with}. "
        f"With guidance {GUIDANCE:g} and no tokens: {guided} and {only_guided}."
    )


def as_picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values * 255).round().astype(np.uint8))
