"""What the study found, as a table and a plot: differences between rows with their intervals."""

import math
import textwrap
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from benchmarks.alignment_figures import (
    ALL_RIGHT,
    CLEAN,
    CLEARLY_RIGHT,
    COUNTED,
    DISTANCE,
    EXACT,
    FEWER,
    HARD_RETRIEVAL,
    LOSS,
    MORE,
    RETRIEVAL,
    TOO_FEW,
    TOO_MANY,
    UNCLEAR_ONES,
    Found,
    Measure,
    shown,
    table,
)
from benchmarks.alignment_places_report import places_section
from benchmarks.alignment_rows import (
    ABLATION,
    AGAIN_PART,
    BASELINE,
    BOTH,
    CFG,
    CONFIRMED,
    CONFIRMED_PART,
    CONTROL,
    COUNTING,
    COUNTING_PART,
    EVERYTHING,
    FOLDER,
    GUIDANCE,
    GUIDANCE_PART,
    HARD,
    HIGH,
    MAIN,
    OPTIONS,
    PICTURES,
    PROMPTS,
    REPORTED,
    ROWS,
    SOFTREPA,
    STEPS,
    TESTS,
    Row,
)
from benchmarks.alignment_tests import FRESH, specs
from benchmarks.smallworld.checker import UNCLEAR
from softrepa.smallworld.world import CATEGORIES, plain_caption

MEASURES = (
    ALL_RIGHT,
    EXACT,
    MORE,
    FEWER,
    CLEARLY_RIGHT,
    *(Measure(f"- {name.replace('_', ' ')}", ("right", name)) for name in CATEGORIES),
    TOO_MANY,
    TOO_FEW,
    UNCLEAR_ONES,
    *(Measure(f"facts: {name.replace('_', ' ')}", ("facts", name)) for name in CATEGORIES),
    RETRIEVAL,
    HARD_RETRIEVAL,
    LOSS,
    CLEAN,
    DISTANCE,
)
FOUND_BEFORE = f'Row "{HIGH}" was found on some of these captions.'
NOTES = {
    OPTIONS: "The best of several rows looks better than it is: they are compared on the prompts that they are "
    "reported on. Nearly half of all hard negatives, and a quarter of those of other numbers, say as wrong what is "
    "held out. AGSM's slow copy of the tokens (decay 0.9999) goes a seventh of the way in so few updates.",
    ABLATION: "The model has three blocks. The paper's ablation of SD3 (table 7) stands beside these figures in "
    "`docs/study.md`.",
    GUIDANCE_PART: f"Prompts of their own, {TESTS[GUIDANCE]} of each category. {FOUND_BEFORE}",
    CONFIRMED_PART: "Asked once more, and written down before it ran: five runs of training that nothing was chosen "
    f"with, new noise, {TESTS[CONFIRMED]} prompts of each category, and in {' and '.join(FRESH).replace('_', ' ')} "
    "captions that no earlier test asked for. What decides is the difference in prompts drawn right with nothing else "
    f'between "{BOTH}" and "{SOFTREPA}".',
    COUNTING_PART: f"Prompts of their own, {TESTS[COUNTING]} of the numbers of shapes that no training caption says. "
    f"{FOUND_BEFORE}",
}
SHORT = {
    EVERYTHING: (ALL_RIGHT, EXACT, COUNTED, RETRIEVAL, HARD_RETRIEVAL, CLEAN, DISTANCE),
    **dict.fromkeys((GUIDANCE, REPORTED, CONFIRMED), (ALL_RIGHT, EXACT, MORE, FEWER, COUNTED, CLEAN, DISTANCE)),
    COUNTING: (COUNTED, TOO_MANY, TOO_FEW, CLEAN, DISTANCE),
}
"""Measures of a row in a table of many, by its test."""
ELSEWHERE = (
    (f"prompts drawn right without guidance, cfg 1 (other {6 * TESTS[GUIDANCE]} prompts)", ALL_RIGHT, "{}, cfg 1"),
    ("- with nothing else, cfg 1", EXACT, "{}, cfg 1"),
    ("- more things than the prompt says, cfg 1", MORE, "{}, cfg 1"),
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
seeds and captions (pictures of one caption count as one, and so do the pictures of a batch that share its captions), of
the distance over seeds only; **bold** where 0 is outside. There is no correction for the number of figures: of 20
differences that are nothing, about one will be bold. A verdict is unclear where a change of one thing's
overlap with an outline by less than {UNCLEAR} would turn it (of drawn scenes none is). Right is what shows all that the
prompt says, as in GenEval; further things do not count against it, so a model that draws more of everything reads
better. "With nothing else" counts them. Where a run is older than a figure, that is "not recorded".""",
        "",
        f"## {MAIN}",
        "",
    ]
    versus = ((SOFTREPA, BASELINE), (SOFTREPA, CONTROL), (CONTROL, BASELINE))
    head = ["", *(f"{name} ({len(found.of(name))} runs)" for name in (BASELINE, SOFTREPA, CONTROL))]
    rows = []
    for title, measure, form in (*((measure.title, measure, "{}") for measure in MEASURES), *ELSEWHERE):
        means = (found.said(form.format(name), measure) for name in (BASELINE, SOFTREPA, CONTROL))
        changes = (found.change(*map(form.format, pair), measure) for pair in versus)
        rows.append([title, *means, *(shown(change, measure) for change in changes)])
    lines += table([*head, *(f"{one} - {other}" for one, other in versus)], rows)
    for part in dict.fromkeys(row.part for row in ROWS.values() if row.part != MAIN):
        note = "Differences from the plain model with the same guidance; of a plain model the figures themselves. "
        note += "A row of one run has no interval."
        own = drawn_again() if part == AGAIN_PART else NOTES.get(part)
        text = textwrap.fill(" ".join(filter(None, (note, own))), 120)
        lines += [f"## {part}", "", text, "", *part_table(found, part)]
        if part in (OPTIONS, ABLATION):
            lines += ["Differences from SoftREPA, of runs with the same seeds:", ""]
            lines += against_softrepa(found, part, ELSEWHERE if part == OPTIONS else ())
        if part in (AGAIN_PART, CONFIRMED_PART):
            lines += ["Differences between them, of runs with the same seeds:", "", *among(found, part)]
    return "\n".join([*lines, *places_section()])


def drawn_again() -> str:
    before = {plain_caption(spec) for _, spec in specs(GUIDANCE)}
    known = sum(plain_caption(spec) in before for _, spec in specs(REPORTED))
    return (
        "What was found without guidance, with the same runs of training on the prompts that the last section reports "
        f"on, {TESTS[REPORTED]} of each category with noise of their own; {known} of these {len(specs(REPORTED))} have "
        f'a caption of "{GUIDANCE_PART}".'
    )


def part_table(found: Found, part: str) -> list[str]:
    """A line for each row of `part`, and of SoftREPA where they take the same test."""
    rows = [row for row in ROWS.values() if row.part == part]
    test = rows[0].test
    if test == EVERYTHING:
        rows.insert(0, ROWS[SOFTREPA])
    measures = SHORT[test]
    lines = []
    for row in rows:
        runs = len(found.of(row))
        if not runs:
            cells = [""] * len(measures)
        elif row.training is None:
            cells = [found.said(row, measure) for measure in measures]
        else:
            cells = [change_from_plain(found, row, measure) for measure in measures]
        lines.append([row.name, str(runs or "not run"), *cells])
    return table(["row", "runs", *(measure.title for measure in measures)], lines)


def against_softrepa(found: Found, part: str, elsewhere: Sequence[tuple[str, Measure, str]]) -> list[str]:
    """What each row of `part` changes about the paper's training, in its own test and those of `elsewhere`."""
    measures = [*((measure.title, measure, "{}") for measure in SHORT[EVERYTHING]), *elsewhere]
    lines = []
    for option in (row.name for row in ROWS.values() if row.part == part):
        cells = []
        for _, measure, form in measures:
            pair = [form.format(name) for name in (option, SOFTREPA)]
            change = found.change(*pair, measure) if pair[0] in ROWS else None
            cells.append(shown(change, measure))
        lines.append([option, *cells])
    return table(["row", *(title for title, _, _ in measures)], lines)


def among(found: Found, part: str) -> list[str]:
    """What trained rows of `part` change about each other, the later about the earlier."""
    names = [row.name for row in ROWS.values() if row.part == part and row.training is not None]
    measures = SHORT[ROWS[names[0]].test]
    lines = [
        [f"{one} - {other}", *(shown(found.change(one, other, measure), measure) for measure in measures)]
        for other, one in combinations(names, 2)
    ]
    return table(["rows", *(measure.title for measure in measures)], lines)


def change_from_plain(found: Found, row: Row, measure: Measure) -> str:
    if not found.values(row, measure):
        return "not recorded"
    return shown(found.change(row, plain_like(row), measure), measure)


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
