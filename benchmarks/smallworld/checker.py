"""Reads a picture of the world: which things it holds, and whether what a caption says is true of it.

The verdicts follow GenEval: an object is present, a count is exact, a relation holds between some pair of the two
classes, an attribute sits on the right class. Nothing here uses the scene that was asked for. Numpy only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from softrepa.smallworld.world import COLOURS, IMAGE_SIZE, SHAPES, Group, Spec, inside

SMALLEST_AREA = 40  # pixels; the smallest things drawn, small triangles and diamonds, cover 130
LEAST_OVERLAP = 0.65  # with the best shape's outline, as intersection over union
UNCLEAR = 0.05  # where a change of one overlap by less would turn a verdict
COLOUR_REACH = 0.30  # how far, in RGB, a thing's median colour may be from the palette's


@dataclass(frozen=True)
class Found:
    """One connected patch of foreground. `shape` or `colour` is None when nothing in the world looks like it.

    overlaps: with each shape's outline.
    """

    shape: str | None
    colour: str | None
    size: str
    x: float
    y: float
    overlaps: dict[str, float]


def _outlines() -> dict[str, tuple[np.ndarray, tuple[float, float, float, float]]]:
    """Each shape's mask on a fine grid cropped to its own extent."""
    axis = (np.arange(128) + 0.5) / 64 - 1
    out = {}
    for shape in SHAPES:
        mask = inside(shape, axis[None, :], axis[:, None])
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        out[shape] = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return out


_OUTLINES = _outlines()


def label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """4-connected components of a boolean picture, numbered from 1: the smallest index spreads until it settles."""
    index = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        grown = np.pad(index, 1)
        spread = np.where(mask, np.maximum.reduce([
            index, grown[:-2, 1:-1], grown[2:, 1:-1], grown[1:-1, :-2], grown[1:-1, 2:],
        ]), 0)  # fmt: skip
        if (spread == index).all():
            break
        index = spread
    values = np.unique(index[mask])
    return np.searchsorted(values, index) * mask + mask, len(values)


def find(image: np.ndarray) -> list[Found]:
    """Every thing in an RGB picture with values 0..1, largest patch first; slivers are ignored."""
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"expected a picture of shape {(IMAGE_SIZE, IMAGE_SIZE, 3)}, got {image.shape}")
    # every colour of the palette has a channel below 0.3, every background none below 0.85
    labels, count = label(image.min(-1) < 0.55)
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    found = []
    for index in range(1, count + 1):
        patch = labels == index
        area = int(patch.sum())
        if area < SMALLEST_AREA:
            continue
        rows, columns = np.flatnonzero(patch.any(1)), np.flatnonzero(patch.any(0))
        crop = patch[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        overlaps = {shape: float(_overlap(crop, outline)) for shape, outline in _OUTLINES.items()}
        shape = max(overlaps, key=overlaps.get)
        distance = np.linalg.norm(palette - np.median(image[patch], axis=0), axis=1)
        nearest = int(distance.argmin())
        found.append((area, Found(
            shape if overlaps[shape] >= LEAST_OVERLAP else None,
            names[nearest] if distance[nearest] <= COLOUR_REACH else None,
            "large" if max(crop.shape) > 20 else "small",
            float(columns[0] + columns[-1] + 1) / 2,
            float(rows[0] + rows[-1] + 1) / 2,
            overlaps,
        )))  # fmt: skip
    return [thing for _, thing in sorted(found, key=lambda entry: -entry[0])]


def _overlap(crop: np.ndarray, outline: np.ndarray) -> float:
    """Intersection over union of a patch and an outline stretched to its bounding box."""
    rows = ((np.arange(crop.shape[0]) + 0.5) * outline.shape[0] / crop.shape[0]).astype(int)
    columns = ((np.arange(crop.shape[1]) + 0.5) * outline.shape[1] / crop.shape[1]).astype(int)
    stretched = outline[rows[:, None], columns[None, :]]
    return (stretched & crop).sum() / (stretched | crop).sum()


def holds(relation: str, first: Found, second: Found) -> bool:
    """Whether `first` is left of, right of, above or below `second`, by their centres."""
    dx, dy = second.x - first.x, second.y - first.y
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return along > 8  # a quarter of a cell: centres of one row or column differ by at most 10 pixels


def _matches(thing: Found, group: Group) -> bool:
    return thing.shape == group.shape and group.colour in (None, thing.colour) and group.size in (None, thing.size)


def facts(found: list[Found], spec: Spec) -> dict[str, bool]:
    """The verdict on everything `spec` says, by GenEval's category (and "size", which GenEval has not).

    Only the facts that the caption states are present. A single object's presence is "single_object", that of each
    of several "two_objects"; a colour on the only object is "colours", on several "colour_attribution".
    """
    several = len(spec.groups) > 1
    verdict: dict[str, bool] = {}
    of_shape = {group.shape: [thing for thing in found if thing.shape == group.shape] for group in spec.groups}
    verdict["two_objects" if several else "single_object"] = all(of_shape.values())
    if any(group.count > 1 for group in spec.groups):
        verdict["counting"] = not any(surplus(found, spec))
    if any(group.colour for group in spec.groups):
        verdict["colour_attribution" if several else "colours"] = all(
            sum(group.colour in (None, thing.colour) for thing in of_shape[group.shape]) >= group.count
            for group in spec.groups
        )
    if any(group.size for group in spec.groups):
        verdict["size"] = all(
            sum(group.size in (None, thing.size) for thing in of_shape[group.shape]) >= group.count
            for group in spec.groups
        )
    if spec.relation is not None:
        first, second = ([t for t in found if _matches(t, group)] for group in spec.groups[:2])
        verdict["position"] = any(holds(spec.relation, a, b) for a in first for b in second)
    return verdict


def surplus(found: list[Found], spec: Spec) -> list[int]:
    """How many things more than asked there are of each group's shape, below 0 where there are fewer."""
    return [sum(thing.shape == group.shape for thing in found) - group.count for group in spec.groups]


def unasked(found: list[Found], spec: Spec) -> int:
    """How many things more than asked there are in all, below 0 where there are fewer.

    A drawn scene holds what its caption says and nothing else. GenEval's verdicts do not mind further things, so by
    them alone a model that draws more of everything reads better.
    """
    return len(found) - sum(group.count for group in spec.groups)


def margin(found: list[Found], spec: Spec) -> float:
    """How near the verdict is to the other one: by how much one overlap would have to change, 1 where none would do.

    It says what a half-drawn thing is worth; colours, sizes and places of things are taken as they are read.
    """
    verdict = all(facts(found, spec).values())
    others = (
        (change, [*found[:index], replace(thing, shape=shape), *found[index + 1 :]])
        for index, thing in enumerate(found)
        for shape, change in _other_readings(thing)
    )
    return min((change for change, things in others if all(facts(things, spec).values()) != verdict), default=1.0)


def _other_readings(thing: Found) -> Iterator[tuple[str | None, float]]:
    """What else a thing may be taken for, and by how much an overlap would have to change for that."""
    best = max(thing.overlaps.values())
    for shape, overlap in thing.overlaps.items():
        if shape != thing.shape:
            yield shape, max(best, LEAST_OVERLAP) - overlap
    if thing.shape is not None:
        yield None, best - LEAST_OVERLAP


def correct(image: np.ndarray, spec: Spec) -> bool:
    """Whether the picture shows all that the caption says."""
    return all(facts(find(image), spec).values())
