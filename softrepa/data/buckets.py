"""Training sizes of about one area, and which image gets which."""

import math
from collections.abc import Sequence
from dataclasses import replace

from .batches import Example, by_size, variety

Size = tuple[int, int]
"""Width and height in pixels."""

WIDEST = 2.5
"""Longer side to shorter side; beyond it more of a picture is cut off."""

FEWEST = 8
"""A size of fewer images joins its nearest: its batches would be small and always the same."""


def bucket_sizes(resolution: int) -> list[Size]:
    """Sizes of at most resolution^2 pixels: the square, and sides in steps of 64 (16 where pictures are tiny)."""
    step = 64 if resolution >= 256 else 16
    sizes = {(resolution, resolution)}
    for width in range(resolution // step * step, int(resolution * WIDEST), step):
        height = resolution * resolution // width // step * step
        if height <= width <= WIDEST * height:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` whose shape is most like that of `size`; of equals the largest."""
    if len(sizes) == 1:
        return sizes[0]
    return min(sizes, key=lambda other: (round(_distance(size, other), 6), -other[0] * other[1]))


def join_small(examples: list[Example]) -> list[Example]:
    """Moves images out of sizes with fewer than FEWEST different images or captions, smallest first."""
    while len(groups := by_size(examples)) > 1:
        smallest = min(groups, key=lambda size: variety(groups[size]))
        if variety(groups[smallest]) >= FEWEST:
            break
        target = nearest(smallest, [size for size in groups if size != smallest])
        examples = [replace(one, size=target) if one.size == smallest else one for one in examples]
    return examples


def _distance(one: Size, other: Size) -> float:
    return abs(math.log(one[0] / one[1]) - math.log(other[0] / other[1]))
