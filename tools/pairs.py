"""Pictures without and with tokens, beside each other on one sheet."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP, LINE = 8, 24
SMALLEST_SHOWN = 192  # pixels; smaller pictures are shown enlarged
WORDS = ("without tokens", "with tokens")
RIGHT, WRONG = "#1a7f37", "#c0392b"


@dataclass(frozen=True)
class Pair:
    """Two pictures of one size; `verdicts` says of each whether it shows what the prompt says, where that is known."""

    prompt: str
    pictures: tuple[Image.Image, Image.Image]
    verdicts: tuple[bool, bool] | None = None


def sheet(pairs: Sequence[Pair], columns: int = 1, footer: str = "") -> Image.Image:
    """Every pair under its prompt; `footer` below all of them."""
    cells = [drawn(pair) for pair in pairs]
    width, height = (max(getattr(cell, side) for cell in cells) + GAP for side in ("width", "height"))
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    canvas = Image.new("RGB", (columns * width + GAP, rows * height + GAP + (LINE if footer else 0)), "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        canvas.paste(cell, (GAP + column * width, GAP + row * height))
    written(canvas, (GAP, rows * height + GAP), footer, size=15)
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
            is_right = pair.verdicts[number]
            text = f"{words}: {'right' if is_right else 'wrong'}"
            written(canvas, (left, LINE + height), text, RIGHT if is_right else WRONG)
    return canvas


def written(canvas: Image.Image, at: tuple[int, int], text: str, colour: str = "black", size: int = 13) -> None:
    """One line of text, `LINE` high."""
    pen = ImageDraw.Draw(canvas)
    pen.text((at[0] + 2, at[1] + LINE // 2), text, fill=colour, font=ImageFont.load_default(size), anchor="lm")
