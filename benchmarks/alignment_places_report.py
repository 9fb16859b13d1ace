"""What the report says of where tokens act: the grid of settings, and the ones that were chosen from it."""

import textwrap

from benchmarks.alignment_figures import (
    ALL_RIGHT,
    CLEAN,
    COUNTED,
    DISTANCE,
    EXACT,
    FEWER,
    MORE,
    TOO_FEW,
    TOO_MANY,
    Found,
    shown,
    table,
)
from benchmarks.alignment_places import PART, PLACINGS, RUNS, chosen, placed, placings, plain
from benchmarks.alignment_rows import (
    BASELINE,
    DEVELOPMENT,
    DEVICES,
    GUIDANCES,
    HIGH,
    REPORTED,
    ROWS,
    SEEDS,
    SOFTREPA,
    TESTS,
    Placing,
)
from benchmarks.alignment_tests import distinct
from softrepa.smallworld.world import CATEGORIES
from softrepa.statistics import CONFIDENCE

BESIDE = (ALL_RIGHT, MORE, FEWER, COUNTED, TOO_MANY, TOO_FEW, CLEAN, DISTANCE)
"""What is shown of a chosen setting beside what it was chosen by."""


def together(rows: int) -> float:
    """Confidence of each of the reported intervals with which those of so many rows hold together (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / (len(GUIDANCES) * rows)


def places_section() -> list[str]:
    """Of every row whose tokens were tried so, by device; of SoftREPA on the CPU where nothing was."""
    trained = [row.name for row in ROWS.values() if row.has_own_tokens]
    tried = [(Found(device), like) for device in DEVICES for like in trained]
    tried = [(found, like) for found, like in tried if was_tried(found, like)] or [(Found(), SOFTREPA)]
    level = together(len(tried))
    lines = [f"## {PART}", "", introduction(len(tried)), ""]
    for found, like in tried:
        lines += [f"### {like}, {made_on(found, like)}", "", *grid(found, like), *reported(found, like, level)]
    return lines


def introduction(rows: int) -> str:
    count = rows * len(GUIDANCES)
    text = (
        "Tokens of a row above, at other strengths, on both halves of guidance or the conditional one only, in all "
        "steps or half of them. Right is here what shows all that the prompt says and nothing else, for tokens may "
        f"draw more of everything. Of every guidance the setting with the most right of {per_test(DEVELOPMENT)} "
        "development prompts is chosen, with a run of training that is not reported on, and reported on "
        f"{per_test(REPORTED)} other prompts, with {SEEDS} other runs. The two have no wording of a caption in common "
        "(about a tenth say the same as one of the other side in another order) and no noise. What the tables of "
        "development prompts show beside the plain model is how the choice was made and no finding: of "
        f"{len(PLACINGS)} settings the best looks better than it is. Up to which strength is tried, and that row "
        f'"{HIGH}" trains timesteps 750 to 999, was itself found on development captions, with a run of the same seed '
        f"as one of these: only the tables of other prompts are free of that choice. The {per_test(REPORTED)} are "
        f"{distinct(REPORTED)} captions, few in some categories; pictures of one caption count as one in intervals. "
        f"The {count} reported differences are bold where all runs are there and intervals leave out 0 at the level at "
        f"which all {count} hold together with about {CONFIDENCE:.0%} (Bonferroni); what stands beside them is not "
        "corrected, and of the distance over runs only. No guidance is compared with another."
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
    """Differences from the plain model, guidances beside each other."""
    best = {cfg: chosen(found, like, cfg) for cfg in GUIDANCES}
    runs = grid_runs(found, like)
    lines = [[BASELINE, *(found.said(plain(cfg, DEVELOPMENT), EXACT) for cfg in GUIDANCES)]]
    for placing in PLACINGS:
        cells = [
            grid_cell(found, like, cfg, placing) + (" chosen" if placing == best[cfg] else "") for cfg in GUIDANCES
        ]
        lines.append([placing.title, *cells])
    text = f"Development prompts drawn right with nothing else ({sum(runs)} of {RUNS * len(runs)} runs done):"
    return [text, "", *table(["", *(f"cfg {cfg:g}" for cfg in GUIDANCES)], lines)]


def grid_cell(found: Found, like: str, cfg: float, placing: Placing) -> str:
    if placing not in placings(cfg):
        return "as on both"
    row = placed(like, cfg, placing, DEVELOPMENT)
    change = found.change(row, plain(cfg, DEVELOPMENT), EXACT)
    if change is None:
        return "not run"
    missing = "" if len(found.of(row)) == row.seeds else f", {len(found.of(row))} of {row.seeds} runs"
    return f"{100 * change.mean:+.1f}{missing}"


def reported(found: Found, like: str, level: float) -> list[str]:
    """The chosen settings beside the plain model at the same guidance, on prompts that nothing was chosen on."""
    lines = []
    for cfg in GUIDANCES:
        placing = chosen(found, like, cfg)
        if placing is None:
            lines.append([f"{cfg:g}", "not chosen yet", "not run", *[""] * (3 + len(BESIDE))])
            continue
        row, beside = placed(like, cfg, placing, REPORTED), plain(cfg, REPORTED)
        runs = len(found.of(row))
        difference = shown(found.change(row, beside, EXACT, level), EXACT)
        lines.append([
            f"{cfg:g}",
            placing.title,
            str(runs) if runs == row.seeds else f"{runs} of {row.seeds}" if runs else "not run",
            *(found.said(one, EXACT) for one in (beside, row)),
            difference if runs == row.seeds else difference.strip("*"),
            *(shown(found.change(row, beside, measure), measure).strip("*") for measure in BESIDE),
        ])  # fmt: skip
    head = ["cfg", "setting", "runs", BASELINE, "with tokens", f"difference ({level:.1%} interval)"]
    title = "Other prompts drawn right with nothing else, with the setting that was chosen:"
    return [title, "", *table([*head, *(measure.title for measure in BESIDE)], lines)]
