"""Where tokens act best: settings are compared on development prompts, the best of each guidance is reported on others.

The tokens of the two are of other seeds too, so that nothing a figure is chosen on is part of what is reported.
"""

from benchmarks.alignment_figures import EXACT, Found
from benchmarks.alignment_rows import BASELINE, DEVELOPMENT, GUIDANCES, REPORTED, ROWS, SEEDS, Placing, Row

PART = "Where tokens act"
FIRST = (1.0, 2.0)
"""None, and what the model is drawn with elsewhere: they run before the others."""
HALVES = ("both", "positive")
STRENGTHS = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)
WINDOWS, WINDOW_STRENGTHS = ((0.0, 0.5), (0.5, 1.0)), (2.0,)
RUNS = 1  # of each setting on development prompts
PLACINGS = [
    *(Placing(strength, half) for half in HALVES for strength in STRENGTHS),
    *(Placing(strength, half, *window) for half in HALVES for window in WINDOWS for strength in WINDOW_STRENGTHS),
]


def placings(cfg: float) -> list[Placing]:
    """Without guidance there is only the conditional half."""
    return [one for one in PLACINGS if cfg != 1 or one.apply_to == "both"]


def plain(cfg: float, test: str) -> Row:
    return Row(f"{BASELINE}, cfg {cfg:g}, {test} prompts", None, PART, cfg=cfg, test=test)


def placed(like: str, cfg: float, placing: Placing, test: str) -> Row:
    """The tokens of row `like`."""
    name = f"{like}, cfg {cfg:g}, {placing.title}, {test} prompts"
    runs, first = (RUNS, SEEDS) if test == DEVELOPMENT else (ROWS[like].seeds, 0)
    return Row(name, {}, PART, runs, cfg, like, test, placing, first)


def in_order() -> list[float]:
    return sorted(GUIDANCES, key=lambda cfg: (cfg not in FIRST, cfg))


def development_rows(like: str, cfg: float) -> list[Row]:
    return [plain(cfg, DEVELOPMENT), *(placed(like, cfg, placing, DEVELOPMENT) for placing in placings(cfg))]


def reported_rows(found: Found, like: str, cfg: float) -> list[Row]:
    """The plain model and the chosen setting, where one is chosen."""
    placing = chosen(found, like, cfg)
    return [plain(cfg, REPORTED), placed(like, cfg, placing, REPORTED)] if placing else []


def chosen(found: Found, like: str, cfg: float) -> Placing | None:
    """The setting with which most development prompts are drawn right, and nothing else with them.

    None until all of that guidance have run.
    """
    rows = {placing: placed(like, cfg, placing, DEVELOPMENT) for placing in placings(cfg)}
    if any(len(found.of(row)) < row.seeds for row in rows.values()):
        return None
    return max(rows, key=lambda placing: found.mean(rows[placing], EXACT))
