"""The picture of a comparison: prompts down, arms across, the seeds of a prompt beside each other inside."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..charts import LIGHT
from ..errors import cut, printable
from .records import Record

CELL = 256
"""The longer side of a picture in the grid, in pixels; smaller ones stay as they are."""
LEAST_CELL = 128
"""Smaller pictures are enlarged by a whole number, so that what is written fits."""
MOST_WIDTH = 4096
GAP = 4
LINES = 6
"""Of a prompt."""


@dataclass(frozen=True)
class Layout:
    """Sizes in pixels: of a picture, of what is written, of the column of prompts."""

    width: int
    height: int
    font: int
    small: int
    left: int

    @classmethod
    def of(cls, size: tuple[int, int], across: int) -> "Layout":
        """For `across` pictures of `size` beside each other: writing grows with the width, as a node shows it small."""
        longer = max(size)
        scale = CELL / longer if longer > CELL else max(1, round(LEAST_CELL / longer))
        scale *= min(1, MOST_WIDTH / (across * scale * size[0]))
        width, height = (max(1, round(scale * side)) for side in size)
        font = max(13, round(across * width / 34))
        return cls(width, height, font, max(11, round(0.8 * font)), 9 * font)


def draw_grid(
    records: Sequence[Record],
    read: Callable[[Record], np.ndarray | None],
    head: str = "",
    scores: Mapping[str, str] | None = None,
) -> Image.Image:
    """Of a plan's records; `read` gives pixels (H, W, 3) of 0 to 1, one at a time, or None of what is not there yet.

    `head` stands above all, `scores` below each picture by its file.
    """
    arms = list(dict.fromkeys(one.arm for one in records))
    prompts = {one.prompt: one.text for one in records}
    seeds = list(dict.fromkeys(one.seed for one in records))
    first = next((pixels for one in records if (pixels := read(one)) is not None), np.zeros((64, 64, 3)))
    layout = Layout.of((first.shape[1], first.shape[0]), len(arms) * len(seeds))
    font, small = ImageFont.load_default(layout.font), ImageFont.load_default(layout.small)
    line, small_line = round(1.3 * layout.font), round(1.25 * layout.small)
    below = small_line if scores else 0
    arm_width = len(seeds) * (layout.width + GAP) + 3 * GAP
    width = layout.left + len(arms) * arm_width
    head_lines = [part for text in head.splitlines() for part in wrapped(text, small, width - 4 * GAP, LINES)]
    top = small_line * len(head_lines) + (GAP if head_lines else 0)
    step = max(layout.height + below, 2 * line) + GAP
    image = Image.new("RGB", (width, top + 2 * line + len(prompts) * step), LIGHT.paper)
    pen = ImageDraw.Draw(image)
    for number, text in enumerate(head_lines):
        pen.text((2 * GAP, GAP + small_line * number), text, LIGHT.ink, small)
    for column, arm in enumerate(arms):
        x = layout.left + column * arm_width
        pen.text((x, top), wrapped(arm, font, arm_width, 1)[0], LIGHT.ink, font)
        for place, seed in enumerate(seeds):
            pen.text((x + place * (layout.width + GAP), top + line), f"seed {seed}", LIGHT.muted, small)
    rows = {prompt: top + 2 * line + row * step for row, prompt in enumerate(prompts)}
    for prompt, text in prompts.items():
        most = max(1, (step - GAP) // small_line)
        for number, part in enumerate(wrapped(text, small, layout.left - 3 * GAP, min(LINES, most))):
            pen.text((2 * GAP, rows[prompt] + number * small_line), part, LIGHT.ink, small)
    for one in records:
        x = layout.left + arms.index(one.arm) * arm_width + seeds.index(one.seed) * (layout.width + GAP)
        y = rows[one.prompt]
        if (pixels := read(one)) is None:
            pen.rectangle((x, y, x + layout.width - 1, y + layout.height - 1), outline=LIGHT.muted)
            continue
        image.paste(_fitted(pixels, layout), (x, y))
        if scores and one.file in scores:
            pen.text((x, y + layout.height), scores[one.file], LIGHT.ink, small)
    return image


def _fitted(pixels: np.ndarray, layout: Layout) -> Image.Image:
    picture = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    grows = layout.width > picture.width
    return picture.resize(
        (layout.width, layout.height), Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS
    )


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, most: int) -> list[str]:
    """`text` in lines no wider than `width`, at most `most` of them; dots stand for what has no room."""
    lines: list[str] = [""]
    for word in cut(printable(text), 1000).split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    fitted = [_narrow(line, font, width) for line in lines[:most]]
    if len(lines) > most:
        fitted[-1] = _narrow(f"{fitted[-1]} ...", font, width)
    return fitted


def _narrow(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line.rstrip('. ')}..."
