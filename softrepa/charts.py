"""Line charts of what is measured: a training run's curves, a score by timestep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
WIDTH, HEIGHT = 400, 260
LEFT, TOP, RIGHT, BOTTOM = 116, 62, 24, 92
TITLE, TEXT = 34, 30
"""Sizes of type, to be read where a node shows the picture at a third of its size."""
ROW = TEXT + 10
"""From a line of type to the next."""


@dataclass(frozen=True)
class Theme:
    """Colours of a picture."""

    ink: Colour
    paper: Colour
    muted: Colour
    grid: Colour
    lines: tuple[Colour, ...]


LIGHT = Theme(
    (32, 32, 36), (250, 250, 248), (110, 110, 118), (226, 226, 224), ((49, 104, 142), (214, 96, 40), (53, 150, 90))
)
DARK = Theme(
    (232, 232, 236), (32, 32, 36), (164, 164, 172), (66, 66, 72), ((94, 170, 222), (240, 140, 84), (110, 200, 140))
)


@dataclass(frozen=True)
class Line:
    """`ys` over `xs`; `band`, if given, is half the height of an interval around each."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    band: Sequence[float] | None = None

    def reach(self) -> list[float]:
        """Everything that has to be in sight."""
        band = self.band or [0.0] * len(self.ys)
        return [y + side * half for y, half in zip(self.ys, band, strict=True) for side in (-1, 1)]


@dataclass(frozen=True)
class Chart:
    """One panel. `level` is drawn as a dashed line: chance, say."""

    title: str
    across: str
    lines: tuple[Line, ...]
    level: tuple[str, float] | None = None
    low: float | None = None
    high: float | None = None

    def without_empty_lines(self) -> "Chart":
        """Lines of no points, or of none that are numbers, are left out."""
        return replace(self, lines=tuple(line for line in self.lines if any(map(math.isfinite, line.ys))))


def draw(charts: Sequence[Chart], theme: Theme = LIGHT) -> Image.Image:
    """The panels side by side."""
    rows = max((row for chart in charts for _, row in _names(chart)), default=0)
    panel = (LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM + rows * ROW)
    image = Image.new("RGB", (panel[0] * len(charts), panel[1]), theme.paper)
    for index, chart in enumerate(charts):
        _panel(ImageDraw.Draw(image), index * panel[0] + LEFT, TOP, chart, theme)
    return image


def as_image(picture: Image.Image) -> torch.Tensor:
    """An IMAGE (1, H, W, 3)."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).unsqueeze(0)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _names(chart: Chart) -> list[tuple[float, int]]:
    """Where the names of several lines stand: how far right, in which row. A name that has no room begins a row."""
    if len(chart.lines) < 2:
        return []
    found, x, row = [], 0.0, 0
    for line in chart.lines:
        width = ImageFont.load_default(TEXT).getlength(line.name)
        if x and x + width > WIDTH + RIGHT:
            x, row = 0.0, row + 1
        found.append((x, row))
        x += max(200, width + 24)
    return found


def _panel(pen: ImageDraw.ImageDraw, left: int, top: int, chart: Chart, theme: Theme) -> None:
    font, small = ImageFont.load_default(TITLE), ImageFont.load_default(TEXT)
    xs = [x for line in chart.lines for x in line.xs]
    ys = [y for line in chart.lines for y in line.reach()]
    ys += [chart.level[1]] if chart.level else []
    first, last = min(xs), max(max(xs), min(xs) + 1e-9)
    low = min(ys) if chart.low is None else chart.low
    high = max(ys) if chart.high is None else chart.high
    high = max(high, low + 1e-9)

    def at(x: float, y: float) -> tuple[float, float]:
        height = (min(max(y, low), high) - low) / (high - low)
        return left + (x - first) / (last - first) * WIDTH, top + (1 - height) * HEIGHT

    pen.text((left - LEFT + 16, top - TOP + 8), chart.title, theme.ink, font)
    for share in (0, 0.5, 1):
        y = top + (1 - share) * HEIGHT
        pen.line((left, y, left + WIDTH, y), theme.grid, 2)
        pen.text((left - 10, y), f"{low + share * (high - low):.3g}", theme.muted, small, anchor="rm")
    below = top + HEIGHT + 8
    pen.text((left, below), f"{first:g}", theme.muted, small)
    pen.text((left + WIDTH, below), f"{last:g}", theme.muted, small, anchor="ra")
    pen.text((left + WIDTH / 2, below), chart.across, theme.muted, small, anchor="ma")
    if chart.level:
        name, value = chart.level
        y = at(first, value)[1]
        for dash in range(left, left + WIDTH, 10):
            pen.line((dash, y, dash + 5, y), theme.muted, 2)
        pen.text((left + WIDTH - 4, y - 4), name, theme.muted, small, anchor="rs")
    names = _names(chart)
    for index, line in enumerate(chart.lines):
        colour = theme.lines[index % len(theme.lines)]
        points = [at(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
        for x, y, half in zip(line.xs, line.ys, line.band or (), strict=False):
            pen.line((at(x, y - half), at(x, y + half)), colour, 4)
        if len(points) > 1:
            pen.line(points, colour, 4, joint="curve")
        if len(points) <= 20:
            for x, y in points:
                pen.ellipse((x - 6, y - 6, x + 6, y + 6), colour)
        if names:
            x, row = names[index]
            pen.text((left + x, below + (row + 1) * ROW), line.name, colour, small)
