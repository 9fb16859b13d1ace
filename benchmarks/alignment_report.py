"""What the study found, as a table and a plot: differences between rows with their intervals."""

import json
import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.alignment_rows import (
    BASELINE,
    CFG,
    CONTROL,
    COUNTING,
    COUNTING_PART,
    EVERYTHING,
    FOLDER,
    GUIDANCE,
    GUIDANCE_PART,
    HARD,
    MAIN,
    OPTIONS,
    PICTURES,
    PROMPTS,
    ROWS,
    SOFTREPA,
    STEPS,
    TESTS,
    Row,
    result_path,
)
from softrepa.smallworld.world import CATEGORIES
from softrepa.statistics import two_way_interval


@dataclass(frozen=True)
class Measure:
    """A figure of each picture (or one of a whole run), found in a result by `of`."""

    title: str
    of: tuple[str, ...]
    percent: bool = True

    def values(self, result: dict) -> list[float]:
        found = result[self.of[0]]
        if self.of[0] == "right" and len(self.of) == 1:
            return [value for category in found.values() for value in category]
        for part in self.of[1:]:
            found = found[part]
        return found if isinstance(found, list) else [found]

    def text(self, value: float, signed: bool = False) -> str:
        if self.percent:
            return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}%"
        return f"{value:+.4f}" if signed else f"{value:.4f}"


ALL_RIGHT = Measure("prompts drawn right", ("right",))
COUNTED = Measure("counting prompts", ("right", "counting"))
RETRIEVAL = Measure("retrieval among 4 captions", ("retrieval",))
HARD_RETRIEVAL = Measure("retrieval beside captions wrong by a fact", ("hard_retrieval",))
LOSS = Measure("contrastive loss", ("loss",), percent=False)
DISTANCE = Measure("distance to drawn scenes", ("distance",), percent=False)
CLEAN = Measure("things drawn cleanly", ("clean",))
MEASURES = (
    ALL_RIGHT,
    *(Measure(f"- {name.replace('_', ' ')}", ("right", name)) for name in CATEGORIES),
    *(Measure(f"facts: {name.replace('_', ' ')}", ("facts", name)) for name in CATEGORIES),
    RETRIEVAL,
    HARD_RETRIEVAL,
    LOSS,
    CLEAN,
    DISTANCE,
)
NOTES = {
    OPTIONS: "The best of several rows looks better than it is: they are compared on the prompts that they are "
    "reported on. AGSM's slow copy of the tokens (decay 0.9999) goes a seventh of the way in so few updates.",
    GUIDANCE_PART: f"Prompts of their own, {TESTS[GUIDANCE]} of each category.",
    COUNTING_PART: f"Prompts of their own, {TESTS[COUNTING]} of the numbers of shapes that no training caption says.",
}
SHORT = {
    EVERYTHING: (ALL_RIGHT, COUNTED, RETRIEVAL, HARD_RETRIEVAL, CLEAN, DISTANCE),
    GUIDANCE: (ALL_RIGHT, COUNTED, CLEAN, DISTANCE),
    COUNTING: (COUNTED, CLEAN, DISTANCE),
}
"""Measures of a row in a table of many, by its test."""
ELSEWHERE = (
    (f"prompts drawn right without guidance, cfg 1 (other {6 * TESTS[GUIDANCE]} prompts)", ALL_RIGHT, "{}, cfg 1"),
    ("- counting, cfg 1", COUNTED, "{}, cfg 1"),
    (f"counting prompts drawn right, cfg {CFG:g} (other {TESTS[COUNTING]} prompts)", COUNTED, "{}, counting"),
)
"""What other tests have of the same tokens: title, measure, the name of the row that has it."""
PANELS = (
    (f"prompts drawn right, cfg {CFG:g}", ALL_RIGHT, "{}"),
    ("prompts drawn right, cfg 1", ALL_RIGHT, "{}, cfg 1"),
    (f"counting prompts drawn right, cfg {CFG:g}", COUNTED, "{}, counting"),
    ("right caption beside captions\nwrong by a fact", HARD_RETRIEVAL, "{}"),
)
"""Of the plot: title, measure, the name of the row that has it."""


@dataclass(frozen=True)
class Difference:
    """Of two rows on the same prompts and noise: the mean and half the width of its 95% interval.

    That is infinite where one seed says nothing of others.
    """

    mean: float
    half: float

    def beyond(self) -> bool:
        return abs(self.mean) > self.half


Figures = dict[int | None, list[float]]
"""By seed and picture; of a model without seeds under None."""


def difference(ones: Figures, others: Figures) -> Difference | None:
    """Of two models on the same pictures, by seeds that both have; one without seeds stands against every seed.

    Seeds of training and pictures are both drawn at random.
    """
    seeds = [seed for seed in (ones if None in others else others) if None in ones or seed in ones]
    if not seeds:
        return None
    cells = np.array(
        [np.subtract(*(rows[None if None in rows else seed] for rows in (ones, others))) for seed in seeds], dtype=float
    )
    return Difference(*two_way_interval(torch.from_numpy(cells[:, ~np.isnan(cells).any(0)])))


@dataclass
class Found:
    """Results of all rows so far, by seed."""

    results: dict[str, dict[int | None, dict]] = field(default_factory=dict)

    def of(self, name: str) -> dict[int | None, dict]:
        if name not in self.results:
            row = ROWS[name]
            paths = {None if row.training is None else job.seed: result_path(job) for job in row.jobs()}
            self.results[name] = {
                seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in paths.items() if path.exists()
            }
        return self.results[name]

    def values(self, name: str, measure: Measure) -> Figures:
        return {seed: measure.values(result) for seed, result in self.of(name).items()}

    def mean(self, name: str, measure: Measure) -> str:
        values = list(self.values(name, measure).values())
        return measure.text(float(np.nanmean(values))) if values else ""

    def change(self, name: str, other: str, measure: Measure) -> Difference | None:
        return difference(self.values(name, measure), self.values(other, measure))


def shown(change: Difference | None, measure: Measure) -> str:
    """With its interval, if there is one; bold where that does not contain 0."""
    if change is None:
        return ""
    if not math.isfinite(change.half):
        return measure.text(change.mean, signed=True)
    low, high = (measure.text(change.mean + side * change.half, signed=True) for side in (-1, 1))
    text = f"{measure.text(change.mean, signed=True)} ({low} to {high})"
    return f"**{text}**" if change.beyond() else text


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return [*lines, ""]


def report(found: Found) -> str:
    measured = len(next((values for values in found.values(BASELINE, RETRIEVAL).values()), []))
    lines = [
        "# Soft tokens on the small world",
        "",
        f"""Written by `python3 -m benchmarks.alignment`. Tokens are trained by the pack's own engine on {PICTURES}
drawn pictures, {STEPS} updates with the paper's constants but what a row names, and tested on captions that say what no
training caption says: other colours of shapes, other numbers of them, other pairs (of a single object's caption nothing
can be held out; the model itself was trained on everything). {PROMPTS} prompts of each category are drawn at cfg
{CFG:g} and read by the checker; retrieval and loss are of {measured} held-out pictures, and of {HARD} beside captions
that are wrong by one fact, with the same noise for all. Differences are in points for shares, with 95% intervals over
seeds and pictures, of the distance over seeds only; **bold** where 0 is outside. There is no correction for the number
of figures: of 20 differences that are nothing, one will be bold.""",
        "",
        f"## {MAIN}",
        "",
    ]
    versus = ((SOFTREPA, BASELINE), (SOFTREPA, CONTROL), (CONTROL, BASELINE))
    head = ["", *(f"{name} ({len(found.of(name))} runs)" for name in (BASELINE, SOFTREPA, CONTROL))]
    rows = []
    for title, measure, form in (*((measure.title, measure, "{}") for measure in MEASURES), *ELSEWHERE):
        means = (found.mean(form.format(name), measure) or "not run" for name in (BASELINE, SOFTREPA, CONTROL))
        changes = (found.change(*map(form.format, pair), measure) for pair in versus)
        rows.append([title, *means, *(shown(change, measure) for change in changes)])
    lines += table([*head, *(f"{one} - {other}" for one, other in versus)], rows)
    for part in dict.fromkeys(row.part for row in ROWS.values() if row.part != MAIN):
        note = "Differences from the plain model with the same guidance; of a plain model the figures themselves. "
        note += "A row of one run has no interval."
        text = textwrap.fill(" ".join(filter(None, (note, NOTES.get(part)))), 120)
        lines += [f"## {part}", "", text, "", *part_table(found, part)]
        if part == OPTIONS:
            lines += ["Differences from SoftREPA, of runs with the same seeds:", "", *against_softrepa(found)]
    return "\n".join(lines)


def part_table(found: Found, part: str) -> list[str]:
    """A line for each row of `part`, and of SoftREPA where they take the same test."""
    rows = [row for row in ROWS.values() if row.part == part]
    test = rows[0].test
    if test == EVERYTHING:
        rows.insert(0, ROWS[SOFTREPA])
    measures = SHORT[test]
    lines = []
    for row in rows:
        results = found.of(row.name)
        if row.training is None:
            cells = [found.mean(row.name, measure) for measure in measures]
        else:
            cells = [shown(found.change(row.name, plain_like(row), measure), measure) for measure in measures]
        lines.append([row.name, str(len(results)) if results else "not run", *cells])
    return table(["row", "runs", *(measure.title for measure in measures)], lines)


def against_softrepa(found: Found) -> list[str]:
    """What an option adds to the paper's training, in every test that it took."""
    measures = [*((measure.title, measure, "{}") for measure in SHORT[EVERYTHING]), *ELSEWHERE]
    lines = []
    for option in (row.name for row in ROWS.values() if row.part == OPTIONS):
        cells = []
        for _, measure, form in measures:
            pair = [form.format(name) for name in (option, SOFTREPA)]
            change = found.change(*pair, measure) if pair[0] in ROWS else None
            cells.append(shown(change, measure))
        lines.append([option, *cells])
    return table(["row", *(title for title, _, _ in measures)], lines)


def plain_like(row: Row) -> str:
    """The plain model in the same test at the same guidance."""
    return next(
        one.name for one in ROWS.values() if one.training is None and (one.cfg, one.test) == (row.cfg, row.test)
    )


def plot(found: Found, path: Path) -> None:
    """Differences from the plain model with their intervals, a panel for each of a few measures."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from softrepa.files import write_atomically

    names = [row.name for row in ROWS.values() if row.part in (MAIN, OPTIONS) and row.training is not None]
    names = [name for name in names if len(found.of(name)) > 1]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 1 + 0.4 * len(names)), sharey=True)
    for axis, (title, measure, row_name) in zip(axes, PANELS, strict=True):
        for place, name in enumerate(names):
            row = ROWS.get(row_name.format(name))
            change = row and found.change(row.name, plain_like(row), measure)
            if change and math.isfinite(change.half):
                axis.errorbar(100 * change.mean, place, xerr=100 * change.half, fmt="o", capsize=3, color="#31688e")
        axis.axvline(0, color="#6e6e76", linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("points, against the plain model", fontsize=8)
        axis.grid(axis="x", color="#e2e2e0")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=90))
    plt.close(figure)


def write_report() -> None:
    from benchmarks.smallworld.measure import replace_text

    found = Found()
    replace_text(FOLDER / "alignment.md", report(found))
    if len(found.of(SOFTREPA)) > 1 and found.of(BASELINE):
        plot(found, FOLDER / "alignment.png")
