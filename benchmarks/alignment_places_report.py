"""What the report says of where tokens act: the grid of settings, and the ones that were chosen from it."""

import math
import textwrap

from benchmarks.alignment_figures import (
    ALL_RIGHT,
    CLEAN,
    CLEARLY_RIGHT,
    COUNTED,
    DISTANCE,
    TOO_FEW,
    TOO_MANY,
    Found,
    shown,
    table,
)
from benchmarks.alignment_places import GUIDANCES, PART, PLACINGS, RUNS, chosen, placed, placings, plain
from benchmarks.alignment_rows import BASELINE, DEVELOPMENT, DEVICES, REPORTED, ROWS, SOFTREPA, TESTS, Placing
from softrepa.smallworld.world import CATEGORIES
from softrepa.statistics import CONFIDENCE

BESIDE = (CLEARLY_RIGHT, COUNTED, TOO_MANY, TOO_FEW, CLEAN, DISTANCE)
"""What is shown of a chosen setting beside what it was chosen by."""
TOGETHER = 1 - (1 - CONFIDENCE) / len(GUIDANCES)
"""Confidence of each of the reported intervals with which all of them hold together (Bonferroni)."""


def places_section() -> list[str]:
    """Of every row whose tokens were tried so, by device; of SoftREPA on the CPU where nothing was."""
    trained = [row.name for row in ROWS.values() if row.has_own_tokens]
    tried = [(Found(device), like) for device in DEVICES for like in trained]
    tried = [(found, like) for found, like in tried if was_tried(found, like)]
    lines = [f"## {PART}", "", introduction(), ""]
    for found, like in tried or [(Found(), SOFTREPA)]:
        lines += [f"### {like}, {made_on(found, like)}", "", *grid(found, like), *reported(found, like)]
    return lines


def introduction() -> str:
    text = (
        "Tokens of a row above, at other strengths, on both halves of guidance or the conditional one only, in all "
        f"steps or half of them. Of every guidance the setting with the most right of {per_test(DEVELOPMENT)} "
        f"development prompts is chosen, with {RUNS} runs of training that are not reported on, and reported on "
        f"{per_test(REPORTED)} other prompts, with the runs of the tables above. The two have no caption in common and "
        "no noise; there are few captions of some categories, and a figure holds for those that it was measured on. "
        "What the tables of development prompts show beside the plain model is how the choice was made and no finding: "
        f"of {len(PLACINGS)} settings the best looks better than it is. The {len(GUIDANCES)} reported differences are "
        f"bold where their intervals leave out 0 at the level at which all {len(GUIDANCES)} hold together with "
        f"{CONFIDENCE:.0%} (Bonferroni); what stands beside them is not corrected."
    )
    return textwrap.fill(text, 120)


def per_test(test: str) -> int:
    return len(CATEGORIES) * TESTS[test]


def was_tried(found: Found, like: str) -> bool:
    """By the setting that is run first at each guidance."""
    return any(found.of(placed(like, cfg, placings(cfg)[0], DEVELOPMENT)) for cfg in GUIDANCES)


def grid_runs(found: Found, like: str) -> list[int]:
    """How many runs there are of each setting."""
    return [len(found.of(placed(like, cfg, one, DEVELOPMENT))) for cfg in GUIDANCES for one in placings(cfg)]


def made_on(found: Found, like: str) -> str:
    tests = (DEVELOPMENT, REPORTED)
    rows = [plain(cfg, test) for cfg in GUIDANCES for test in tests]
    rows += [placed(like, cfg, one, test) for cfg in GUIDANCES for one in placings(cfg) for test in tests]
    versions = sorted({result["made"]["torch"] for row in rows for result in found.of(row).values()})
    return f"drawn on {found.device}" + (f" by PyTorch {', '.join(versions)}" if versions else "")


def grid(found: Found, like: str) -> list[str]:
    """Differences from the plain model with half their intervals, guidances beside each other."""
    best = {cfg: chosen(found, like, cfg) for cfg in GUIDANCES}
    runs = grid_runs(found, like)
    lines = [[BASELINE, *(found.said(plain(cfg, DEVELOPMENT), ALL_RIGHT) for cfg in GUIDANCES)]]
    for placing in PLACINGS:
        cells = [
            grid_cell(found, like, cfg, placing) + (" chosen" if placing == best[cfg] else "") for cfg in GUIDANCES
        ]
        lines.append([placing.title, *cells])
    text = f"Development prompts drawn right ({sum(runs)} of {RUNS * len(runs)} runs done):"
    return [text, "", *table(["", *(f"cfg {cfg:g}" for cfg in GUIDANCES)], lines)]


def grid_cell(found: Found, like: str, cfg: float, placing: Placing) -> str:
    if placing not in placings(cfg):
        return "as on both"
    row = placed(like, cfg, placing, DEVELOPMENT)
    change = found.change(row, plain(cfg, DEVELOPMENT), ALL_RIGHT)
    if change is None:
        return "not run"
    half = f" ± {100 * change.half:.1f}" if math.isfinite(change.half) else ""
    missing = "" if len(found.of(row)) == row.seeds else f", {len(found.of(row))} of {row.seeds} runs"
    return f"{100 * change.mean:+.1f}{half}{missing}"


def reported(found: Found, like: str) -> list[str]:
    """The chosen settings beside the plain model at the same guidance, on prompts that nothing was chosen on."""
    lines = []
    for cfg in GUIDANCES:
        placing = chosen(found, like, cfg)
        if placing is None:
            lines.append([f"{cfg:g}", "not chosen yet", "not run", *[""] * (3 + len(BESIDE))])
            continue
        row, beside = placed(like, cfg, placing, REPORTED), plain(cfg, REPORTED)
        runs = len(found.of(row))
        lines.append([
            f"{cfg:g}",
            placing.title,
            str(runs) if runs == row.seeds else f"{runs} of {row.seeds}" if runs else "not run",
            *(found.said(one, ALL_RIGHT) for one in (beside, row)),
            shown(found.change(row, beside, ALL_RIGHT, TOGETHER), ALL_RIGHT),
            *(shown(found.change(row, beside, measure), measure).strip("*") for measure in BESIDE),
        ])  # fmt: skip
    head = ["cfg", "setting", "runs", BASELINE, "with tokens", f"difference ({TOGETHER:.0%} interval)"]
    title = "Other prompts drawn right, with the setting that was chosen:"
    return [title, "", *table([*head, *(measure.title for measure in BESIDE)], lines)]
