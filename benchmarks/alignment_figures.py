"""Figures of the study's runs, and differences between rows with their intervals."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.alignment_rows import CPU, ROWS, Row, result_path
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
        return {seed: measure.values(result) for seed, result in self.of(row).items()}

    def mean(self, row: str | Row, measure: Measure) -> float:
        """Over runs and pictures; NaN where nothing was measured."""
        values = list(self.values(row, measure).values())
        return float(np.nanmean(values)) if values else math.nan

    def change(self, row: str | Row, other: str | Row, measure: Measure) -> Difference | None:
        return difference(self.values(row, measure), self.values(other, measure))


def figure(mean: float, measure: Measure) -> str:
    return "" if math.isnan(mean) else measure.text(mean)


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
