"""Draws the pack's icon and banner: rows of a prompt's tokens, square, with soft tokens glowing among them, by layer.

python3 -m tools.icon [icon.png [banner.png]]
"""

import argparse

from PIL import Image, ImageChops, ImageDraw, ImageFilter

ICON, BANNER = (400, 400), (1260, 540)
"""Pixels; the registry wants a square and 21:9."""
SCALE = 4  # drawn larger and reduced, which smooths the edges
TOKEN, GAP = 64, 16
LEAST_MARGIN = 48
BACKGROUND = (24, 24, 38)
PLAIN = (88, 94, 128)
SOFT = ((255, 209, 102), (255, 166, 92), (250, 116, 106), (214, 84, 148))  # from the first layer to the last
SOFT_COLUMNS = (1, 2)


def draw(size: tuple[int, int]) -> Image.Image:
    """As many tokens in a row as there is room for."""
    columns = (size[0] - 2 * LEAST_MARGIN + GAP) // (TOKEN + GAP)
    corner = tuple(
        (side - count * (TOKEN + GAP) + GAP) / 2 for side, count in zip(size, (columns, len(SOFT)), strict=True)
    )
    drawn = (size[0] * SCALE, size[1] * SCALE)
    sharp = Image.new("RGBA", drawn)
    glow = Image.new("RGB", drawn)
    on_sharp, on_glow = ImageDraw.Draw(sharp), ImageDraw.Draw(glow)
    for row, colour in enumerate(SOFT):
        for column in range(columns):
            if column in SOFT_COLUMNS:
                on_glow.ellipse(box(corner, row, column, grown=6), fill=colour)
                on_sharp.ellipse(box(corner, row, column), fill=colour)
            else:
                on_sharp.rounded_rectangle(box(corner, row, column), 10 * SCALE, fill=PLAIN)
    background = Image.new("RGB", drawn, BACKGROUND)
    picture = ImageChops.screen(background, glow.filter(ImageFilter.GaussianBlur(18 * SCALE)))
    picture.paste(sharp, mask=sharp)
    picture.putalpha(rounded_corners(drawn))
    return picture.resize(size, Image.Resampling.LANCZOS)


def box(corner: tuple[float, ...], row: int, column: int, grown: int = 0) -> tuple[float, ...]:
    """The token in that row and column of a table whose upper left corner is there."""
    left, top = (first + index * (TOKEN + GAP) for first, index in zip(corner, (column, row), strict=True))
    return tuple(SCALE * edge for edge in (left - grown, top - grown, left + TOKEN + grown, top + TOKEN + grown))


def rounded_corners(drawn: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", drawn)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, drawn[0] - 1, drawn[1] - 1), 72 * SCALE, fill=255)
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tools.icon", description=__doc__.splitlines()[0])
    parser.add_argument("icon", nargs="?", default="icon.png")
    parser.add_argument("banner", nargs="?", default="banner.png")
    arguments = parser.parse_args()
    draw(ICON).save(arguments.icon, optimize=True)
    draw(BANNER).save(arguments.banner, optimize=True)


if __name__ == "__main__":
    main()
