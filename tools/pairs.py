"""Pictures without and with tokens, beside each other on one sheet."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP, LINE = 8, 24
SMALLEST_SHOWN = 192  # pixels; smaller pictures are shown enlarged
WORDS = ("without tokens", "with tokens")
COLOURS = {"right": "#1a7f37", "and more": "#9a6700", "wrong": "#c0392b"}
"""Of verdicts: all that the prompt says and nothing else; all, and further things; not all."""


@dataclass(frozen=True)
class Pair:
    """Two pictures of one size; `verdicts` says of each what `COLOURS` knows, where that is known."""

    prompt: str
    pictures: tuple[Image.Image, Image.Image]
    verdicts: tuple[str, str] | None = None


def sheet(pairs: Sequence[Pair], columns: int = 1, footer: str = "") -> Image.Image:
    """Every pair under its prompt; `footer` below all of them."""
    cells = [drawn(pair) for pair in pairs]
    width, height = (max(getattr(cell, side) for cell in cells) + GAP for side in ("width", "height"))
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    lines = footer.splitlines()
    canvas = Image.new("RGB", (columns * width + GAP, rows * height + GAP + len(lines) * LINE), "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        canvas.paste(cell, (GAP + column * width, GAP + row * height))
    for number, line in enumerate(lines):
        written(canvas, (GAP, rows * height + GAP + number * LINE), line, size=15)
    return canvas


def drawn(pair: Pair) -> Image.Image:
    factor = max(1, -(-SMALLEST_SHOWN // pair.pictures[0].width))
    ones = [one.resize((one.width * factor, one.height * factor), Image.Resampling.NEAREST) for one in pair.pictures]
    width, height = ones[0].size
    canvas = Image.new("RGB", (2 * width + 2, height + 2 * LINE), "white")
    written(canvas, (0, 0), pair.prompt)
    for number, (one, words) in enumerate(zip(ones, WORDS, strict=True)):
        left = number * (width + 2)
        canvas.paste(one, (left, LINE))
        if pair.verdicts is None:
            written(canvas, (left, LINE + height), words)
        else:
            verdict = pair.verdicts[number]
            written(canvas, (left, LINE + height), f"{words}: {verdict}", COLOURS[verdict])
    return canvas


def written(canvas: Image.Image, at: tuple[int, int], text: str, colour: str = "black", size: int = 13) -> None:
    """One line of text, `LINE` high."""
    pen = ImageDraw.Draw(canvas)
    pen.text((at[0] + 2, at[1] + LINE // 2), text, fill=colour, font=ImageFont.load_default(size), anchor="lm")
