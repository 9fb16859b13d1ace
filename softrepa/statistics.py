"""What is a difference between two ways to draw, and what is chance.

Compared pictures share prompt and noise, so the differences of pairs are what counts. Several seeds of a prompt tell
more of that prompt, not of other prompts: a prompt's differences are averaged first, and the interval is one over
prompts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from .errors import SoftREPAError

CONFIDENCE = 0.95
POWER = 0.8
"""Chance that a comparison of as many prompts as `Difference.needed` says finds an effect that is there."""
MOST_NEEDED = 10**9
GRID = 2000
"""Intervals of Simpson's rule."""

Figures = Mapping[tuple[int, int], float]
"""A figure of each picture, by prompt and seed."""


@dataclass(frozen=True)
class Difference:
    """Mean difference, with half the width of its 95% interval: infinite where one prompt says nothing of others.

    `deviation` is the standard deviation of one prompt's difference.
    """

    mean: float
    half: float
    deviation: float
    prompts: int
    pictures: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def beyond(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half

    def needed(self) -> int | None:
        """Prompts with which an effect of the size found is seen with 80% power; None where that cannot be said.

        The smallest n with sqrt(n) |mean| / deviation >= t(0.975) + t(0.8), both with n - 1 degrees of freedom.
        """
        if self.prompts < 2 or not self.mean:
            return None
        size = abs(self.mean) / self.deviation if self.deviation else math.inf
        level = (1 + CONFIDENCE) / 2
        count = max(2, math.ceil((sum(map(NormalDist().inv_cdf, (level, POWER))) / size) ** 2))
        while count < MOST_NEEDED and math.sqrt(count) * size < sum(
            t_quantile(share, count - 1) for share in (level, POWER)
        ):
            count += 1
        return min(count, MOST_NEEDED)


def paired_difference(ones: Figures, others: Figures) -> Difference:
    """Of `ones` from `others` on the pictures that both have."""
    pairs = sorted(ones.keys() & others.keys())
    if not pairs:
        raise SoftREPAError("The two have 0 pictures of the same prompt and seed, expected 1 or more.")
    by_prompt: dict[int, list[float]] = {}
    for key in pairs:
        by_prompt.setdefault(key[0], []).append(ones[key] - others[key])
    means = torch.tensor([sum(values) / len(values) for values in by_prompt.values()], dtype=torch.float64)
    if not torch.isfinite(means).all():
        raise SoftREPAError("A score is NaN or infinite, expected finite numbers.")
    return Difference(*mean_interval(means), prompts=len(means), pictures=len(pairs))


def mean_interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of (n,) values, half its 95% interval by Student's t, and their standard deviation."""
    if len(values) < 2:
        return float(values.mean()), math.inf, math.nan
    deviation = float(values.std())
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return float(values.mean()), half, deviation


def two_way_interval(cells: Tensor, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Mean of (runs, pictures) cells and half its interval, where both runs and pictures are drawn at random.

    The variance of the mean is that of a two-way layout with one figure a cell, (MS_runs + MS_pictures - MS_rest) / n,
    with Satterthwaite's degrees of freedom. One run says nothing of others.
    """
    runs, pictures = cells.shape
    mean = cells.mean()
    if runs < 2:
        return float(mean), math.inf
    by_run, by_picture = cells.mean(1), cells.mean(0)
    terms = [(1, pictures * float(by_run.var()), runs - 1)]
    if pictures > 1:
        rest, free = cells - by_run[:, None] - by_picture + mean, (runs - 1) * (pictures - 1)
        terms += [(1, runs * float(by_picture.var()), pictures - 1), (-1, float((rest**2).sum()) / free, free)]
    total = max(sum(sign * square for sign, square, _ in terms), *(square for sign, square, _ in terms if sign > 0))
    spread = sum(square**2 / free for _, square, free in terms)
    degrees = max(total**2 / spread, runs - 1) if spread else runs - 1
    return float(mean), t_quantile((1 + confidence) / 2, degrees) * math.sqrt(total / cells.numel())


@cache
def t_quantile(share: float, degrees: float) -> float:
    """Student's t below which `share` lies, more than half of all, by bisection."""
    high = NormalDist().inv_cdf(share)
    while t_share(high, degrees) < share:
        high *= 2
    low = high / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if t_share(middle, degrees) >= share else (middle, high)
    return high


def t_share(value: float, degrees: float) -> float:
    """What lies below `value` of Student's t: its density integrated over the angle atan(t / sqrt(degrees))."""
    angle = math.atan(value / math.sqrt(degrees))
    heights = torch.linspace(0, angle, GRID + 1, dtype=torch.float64).cos().pow(degrees - 1)
    area = float(heights[0] + 4 * heights[1::2].sum() + 2 * heights[2:-1:2].sum() + heights[-1]) * angle / GRID / 3
    return 0.5 + area * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)


@dataclass(frozen=True)
class Unit:
    """How a figure and its differences are written: shares in percent and points, others as they are."""

    percent: bool = False

    def figure(self, value: float) -> str:
        return f"{100 * value:.1f}%" if self.percent else f"{value:.4g}"

    def change(self, value: float) -> str:
        return f"{100 * value:+.1f}" if self.percent else f"{value:+.3g}"

    @property
    def word(self) -> str:
        return " points" if self.percent else ""


def verdict(found: Difference, unit: Unit, baseline: str, drawn: str = "prompts") -> str:
    """A sentence or two: the difference, its interval, what may be said of it.

    `drawn` is what was drawn at random, prompts or images.
    """
    start = f"{unit.change(found.mean)}{unit.word}"
    if found.prompts < 2:
        return f"{start}: nothing can be said from one of the {drawn}."
    start += f" ({unit.change(found.low)} to {unit.change(found.high)})"
    pairs = "" if found.pictures == found.prompts else f"{found.pictures:,} pairs of pictures, "
    counted = f"{pairs}{found.prompts:,} {drawn}"
    if not found.mean and not found.half:
        return f"{start}: no difference from {baseline} in {counted}."
    if found.beyond():
        return f"{start}: {'above' if found.mean > 0 else 'below'} {baseline}, from {counted}."
    needed = found.needed()
    if needed is None:
        return f"{start}: nothing can be said from {counted}."
    count = f"more than {MOST_NEEDED:,}" if needed == MOST_NEEDED else f"about {needed:,}"
    return (
        f"{start}: nothing can be said from {counted}. To see an effect of this size takes {count} {drawn} "
        f"({POWER:.0%} power)."
    )
