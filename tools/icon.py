"""Draws the pack's icon: rows of a prompt's tokens, square, with soft tokens glowing among them, layer by layer.

python3 -m tools.icon [icon.png]
"""

import argparse

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 400
SCALE = 4  # drawn larger and reduced, which smooths the edges
MARGIN, TOKEN, GAP = 48, 64, 16
BACKGROUND = (24, 24, 38)
PLAIN = (88, 94, 128)
SOFT = ((255, 209, 102), (255, 166, 92), (250, 116, 106), (214, 84, 148))  # from the first layer to the last
SOFT_COLUMNS = (1, 2)


def draw() -> Image.Image:
    side = SIZE * SCALE
    sharp = Image.new("RGBA", (side, side))
    glow = Image.new("RGB", (side, side))
    on_sharp, on_glow = ImageDraw.Draw(sharp), ImageDraw.Draw(glow)
    for row, colour in enumerate(SOFT):
        for column in range(len(SOFT)):
            if column in SOFT_COLUMNS:
                on_glow.ellipse(box(row, column, grown=6), fill=colour)
                on_sharp.ellipse(box(row, column), fill=colour)
            else:
                on_sharp.rounded_rectangle(box(row, column), 10 * SCALE, fill=PLAIN)
    background = Image.new("RGB", (side, side), BACKGROUND)
    icon = ImageChops.screen(background, glow.filter(ImageFilter.GaussianBlur(18 * SCALE)))
    icon.paste(sharp, mask=sharp)
    icon.putalpha(rounded_corners(side))
    return icon.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def box(row: int, column: int, grown: int = 0) -> tuple[int, int, int, int]:
    left, top = (MARGIN + index * (TOKEN + GAP) for index in (column, row))
    right, bottom = left + TOKEN, top + TOKEN
    return SCALE * (left - grown), SCALE * (top - grown), SCALE * (right + grown), SCALE * (bottom + grown)


def rounded_corners(side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side - 1, side - 1), 72 * SCALE, fill=255)
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tools.icon", description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", default="icon.png")
    draw().save(parser.parse_args().path, optimize=True)


if __name__ == "__main__":
    main()
