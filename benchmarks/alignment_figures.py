"""Figures of the study's runs, and differences between rows with their intervals."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.alignment_rows import CPU, ROWS, Row, result_path
from benchmarks.alignment_tests import groups
from benchmarks.smallworld.checker import UNCLEAR
from softrepa.statistics import CONFIDENCE, two_way_interval


@dataclass(frozen=True)
class Measure:
    """A figure of each picture (or one of a whole run), found in a result by `of`; earlier ones do not have all."""

    title: str
    of: tuple[str, ...]
    percent: bool = True

    def values(self, result: dict) -> list[float] | None:
        found = (result | derived(result)).get(self.of[0])
        if self.of[0] == "right" and len(self.of) == 1:
            return [value for category in found.values() for value in category]
        for part in self.of[1:]:
            found = found[part]
        return [found] if isinstance(found, int | float) else found

    def text(self, value: float, signed: bool = False) -> str:
        if self.percent:
            return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}%"
        return f"{value:+.4f}" if signed else f"{value:.4f}"


def derived(result: dict) -> dict:
    """What follows from a result's figures, where it has them."""
    made = {}
    right = [value for category in result.get("right", {}).values() for value in category]
    if "unasked" in result:
        made["exact"] = [value * (number == 0) for value, number in zip(right, result["unasked"], strict=True)]
        made["more"] = [float(number > 0) for number in result["unasked"]]
        made["fewer"] = [float(number < 0) for number in result["unasked"]]
    if "surplus" in result:
        made["too_many"] = [float(number > 0) for number in result["surplus"]]
        made["too_few"] = [float(number < 0) for number in result["surplus"]]
    if "margin" in result:
        made["unclear"] = [float(margin < UNCLEAR) for margin in result["margin"]]
        made["clearly_right"] = [value * (1 - unclear) for value, unclear in zip(right, made["unclear"], strict=True)]
    return made


ALL_RIGHT = Measure("prompts drawn right", ("right",))
EXACT = Measure("prompts drawn right with nothing else", ("exact",))
MORE = Measure("more things than the prompt says", ("more",))
FEWER = Measure("fewer things than the prompt says", ("fewer",))
COUNTED = Measure("counting prompts", ("right", "counting"))
TOO_MANY = Measure("counting: too many", ("too_many",))
TOO_FEW = Measure("counting: too few", ("too_few",))
CLEARLY_RIGHT = Measure("prompts clearly drawn right", ("clearly_right",))
UNCLEAR_ONES = Measure("unclear verdicts", ("unclear",))
RETRIEVAL = Measure("retrieval among 4 captions", ("retrieval",))
HARD_RETRIEVAL = Measure("retrieval beside captions wrong by a fact", ("hard_retrieval",))
LOSS = Measure("contrastive loss", ("loss",), percent=False)
DISTANCE = Measure("distance to drawn scenes", ("distance",), percent=False)
CLEAN = Measure("things drawn cleanly", ("clean",))


@dataclass(frozen=True)
class Difference:
    """Of two rows on the same prompts and noise: the mean and half the width of its interval.

    That is infinite where one seed says nothing of others.
    """

    mean: float
    half: float

    def beyond(self) -> bool:
        """Whether 0 is outside; where no picture differs there is nothing to say."""
        return abs(self.mean) > self.half > 0


Figures = dict[int | None, list[float]]
"""By seed and picture; of a model without seeds under None."""


def difference(
    ones: Figures, others: Figures, confidence: float = CONFIDENCE, groups: Sequence[str] | None = None
) -> Difference | None:
    """Of two models on the same pictures, by seeds that both have; one without seeds stands against every seed.

    Seeds of training and pictures are both drawn at random; pictures of one of the `groups` as one.
    """
    seeds = [seed for seed in (ones if None in others else others) if None in ones or seed in ones]
    if not seeds:
        return None
    cells = np.array(
        [np.subtract(*(rows[None if None in rows else seed] for rows in (ones, others))) for seed in seeds], dtype=float
    )
    known = ~np.isnan(cells).any(0)
    cells = cells[:, known]
    if groups is not None:
        cells = of_groups(cells, np.asarray(groups)[known])
    return Difference(*two_way_interval(torch.from_numpy(cells), confidence))


def of_groups(cells: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(runs, groups) of (runs, pictures): every run's mean stays, and groups vary as their sums do.

    The variance of a mean over clusters of unequal sizes, linearised (Cochran, Sampling Techniques, chapter 9A).
    """
    names, places = np.unique(groups, return_inverse=True)
    sums, mean = np.zeros((len(cells), len(names))), cells.mean()
    np.add.at(sums, (slice(None), places), cells - mean)
    return mean + len(names) * sums / cells.shape[1]


@dataclass
class Found:
    """Results of all rows so far, by seed: those that were made on `device`."""

    device: str = CPU
    results: dict[str, dict[int | None, dict]] = field(default_factory=dict)

    def of(self, asked: str | Row) -> dict[int | None, dict]:
        """`asked` is a row, or the name of one of `ROWS`."""
        row = ROWS[asked] if isinstance(asked, str) else asked
        if row.name not in self.results:
            paths = {None if row.training is None else job.seed: result_path(job) for job in row.jobs(self.device)}
            self.results[row.name] = {
                seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in paths.items() if path.exists()
            }
        return self.results[row.name]

    def values(self, row: str | Row, measure: Measure) -> Figures:
        values = {seed: measure.values(result) for seed, result in self.of(row).items()}
        return {seed: figures for seed, figures in values.items() if figures is not None}

    def mean(self, row: str | Row, measure: Measure) -> float:
        """Over runs and pictures; NaN where nothing was measured."""
        values = list(self.values(row, measure).values())
        return float(np.nanmean(values)) if values else math.nan

    def change(
        self, row: str | Row, other: str | Row, measure: Measure, confidence: float = CONFIDENCE
    ) -> Difference | None:
        ones, others = self.values(row, measure), self.values(other, measure)
        count = len(next(iter(ones.values()), []))
        asked = ROWS[row] if isinstance(row, str) else row
        return difference(ones, others, confidence, groups(asked.test, measure.of, count) if count else None)

    def said(self, row: str | Row, measure: Measure) -> str:
        """The mean in words, or why there is none."""
        if not self.of(row):
            return "not run"
        mean = self.mean(row, measure)
        return "not recorded" if math.isnan(mean) else measure.text(mean)


def shown(change: Difference | None, measure: Measure) -> str:
    """With its interval, if there is one; bold where that does not contain 0."""
    if change is None:
        return ""
    if not math.isfinite(change.half):
        return measure.text(change.mean, signed=True)
    if not change.half:
        return f"{measure.text(change.mean, signed=True)} (no picture differs from another in this)"
    low, high = (measure.text(change.mean + side * change.half, signed=True) for side in (-1, 1))
    text = f"{measure.text(change.mean, signed=True)} ({low} to {high})"
    return f"**{text}**" if change.beyond() else text


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return [*lines, ""]
