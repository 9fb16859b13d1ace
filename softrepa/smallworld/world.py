"""The world: what a scene may hold, how it is worded and how it is drawn. Numpy only."""

from dataclasses import dataclass, replace

import numpy as np

IMAGE_SIZE = 96
GRID = 3
CELL = IMAGE_SIZE // GRID

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.96, 0.55, 0.10),
    "yellow": (0.95, 0.86, 0.15),
    "green": (0.20, 0.65, 0.25),
    "blue": (0.15, 0.35, 0.86),
    "purple": (0.58, 0.24, 0.70),
    "black": (0.12, 0.12, 0.13),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
SIZES = {"small": 8.5, "large": 12.0}  # half extent in pixels
JITTER = {"small": 4.5, "large": 2.0}  # how far a centre may be from its cell's: neighbours keep a gap of 4 pixels
SPREAD = 0.25  # the share of that which the world uses; the parts are trained on all of it first
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")


@dataclass(frozen=True)
class Group:
    """Things that a caption names together; None is an attribute it leaves open."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Spec:
    """What a caption says: the groups, and where the first lies relative to the second."""

    groups: tuple[Group, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Thing:
    """One drawn object, its centre in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn."""

    things: tuple[Thing, ...]
    background: tuple[float, ...]  # mean RGB, then the gradient's direction in radians and its height


# ---------------------------------------------------------------- what a scene may hold


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _group(rng, shape, count=1, colour=0.0, size=0.0) -> Group:
    """A group of `shape`; `colour` and `size` are the chances that the caption names them."""
    named_colour = _pick(rng, tuple(COLOURS)) if rng.random() < colour else None
    named_size = _pick(rng, tuple(SIZES)) if rng.random() < size else None
    return Group(shape, count, named_colour, named_size)


def _two_colours(rng, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    colours = rng.permutation(list(COLOURS))[: len(groups)]
    return tuple(replace(group, colour=str(colour)) for group, colour in zip(groups, colours, strict=True))


def random_spec(rng: np.random.Generator, category: str) -> Spec:
    """A random prompt of one of GenEval's categories, or of "mixed", the world's longer captions."""
    first, second, third = (str(shape) for shape in rng.permutation(list(SHAPES))[:3])
    if category == "single_object":
        return Spec((_group(rng, first),))
    if category == "colours":
        return Spec((_group(rng, first, colour=1.0),))
    if category == "counting":
        return Spec((_group(rng, first, int(rng.integers(2, 5)), colour=0.4),))
    pair = (_group(rng, first), _group(rng, second))
    if category == "two_objects":
        return Spec(pair)
    if category == "colour_attribution":
        return Spec(_two_colours(rng, pair))
    if category == "position":
        return Spec(_two_colours(rng, pair) if rng.random() < 0.4 else pair, _pick(rng, RELATIONS))
    if category != "mixed":
        raise ValueError(f"unknown category {category!r}: expected one of {', '.join(CATEGORIES)} or mixed")
    kind = rng.random()
    if kind < 0.2:
        return Spec((_group(rng, first, colour=0.6, size=1.0),))
    if kind < 0.5:
        return Spec(_two_colours(rng, (*pair, _group(rng, third))))
    counts = _pick(rng, ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2)))
    groups = tuple(_group(rng, shape, count, size=0.4) for shape, count in zip((first, second), counts, strict=True))
    relation = _pick(rng, RELATIONS) if rng.random() < 0.5 else None
    return Spec(_two_colours(rng, groups) if rng.random() < 0.8 else groups, relation)


def _cells(rng, spec: Spec) -> list[list[tuple[int, int]]]:
    """Free (column, row) cells for every group, obeying the relation."""
    wanted = [group.count for group in spec.groups]
    axis = 0 if spec.relation in ("left of", "right of") else 1
    while True:
        flat = rng.permutation(GRID * GRID)[: sum(wanted)]
        cells = [(int(i) % GRID, int(i) // GRID) for i in flat]
        groups = [cells[sum(wanted[:k]) : sum(wanted[: k + 1])] for k in range(len(wanted))]
        if spec.relation is None:
            return groups
        near, far = groups[:2] if spec.relation in ("left of", "above") else groups[1::-1]
        if max(cell[axis] for cell in near) < min(cell[axis] for cell in far):
            return groups


def random_scene(rng: np.random.Generator, spec: Spec, spread: float = SPREAD) -> Scene:
    """A scene of which `spec` is true and which holds nothing else."""
    things = []
    for group, cells in zip(spec.groups, _cells(rng, spec), strict=True):
        size = group.size or _pick(rng, tuple(SIZES))
        for column, row in cells:
            colour = group.colour or _pick(rng, tuple(COLOURS))
            dx, dy = rng.uniform(-JITTER[size], JITTER[size], 2) * spread
            x, y = (column + 0.5) * CELL + dx, (row + 0.5) * CELL + dy
            things.append(Thing(group.shape, colour, size, float(x), float(y)))
    mean = rng.uniform(0.88, 0.95, 3)
    return Scene(tuple(things), (*map(float, mean), float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0, 0.06))))


# ---------------------------------------------------------------- how it is worded


def _phrase(rng, group: Group) -> str:
    noun = group.shape if group.count == 1 else {"cross": "crosses"}.get(group.shape, group.shape + "s")
    words = [word for word in (group.size, group.colour, noun) if word]
    if group.count > 1:
        return " ".join([NUMBERS[group.count], *words])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join(["one" if rng.random() < 0.1 else article, *words])


def caption(rng, spec: Spec) -> str:
    """One of the ways to say `spec`."""
    phrases = [_phrase(rng, group) for group in spec.groups]
    if spec.relation is not None:
        relation, order = spec.relation, phrases[:2]
        if rng.random() < 0.2:
            relation, order = OPPOSITE[relation], order[::-1]
        words = {
            "left of": ("left of", "to the left of"),
            "right of": ("right of", "to the right of"),
            "above": ("above", "over"),
            "below": ("below", "under"),
        }[relation]
        text = f" {_pick(rng, words)} ".join(order)
    else:
        order = [phrases[i] for i in rng.permutation(len(phrases))]
        text = f" {_pick(rng, ('and', 'and', 'with'))} ".join(order[-2:])
        text = ", ".join([*order[:-2], text])
    return _pick(rng, ("", "", "a picture of ", "a drawing of ", "an image of ")) + text


def plain_caption(spec: Spec) -> str:
    """The shortest wording, the same every time."""

    class First:
        """Stands in for a generator: no rewording, every choice the first."""

        random = staticmethod(lambda: 0.99)
        integers = staticmethod(lambda high: 0)
        permutation = staticmethod(range)

    return caption(First(), spec)


def hard_negatives(spec: Spec) -> list[Spec]:
    """Captions that share the words of `spec` but for one fact: swapped colours, a turned relation, one more."""
    out = []
    groups = spec.groups
    if spec.relation is not None:
        out.append(replace(spec, relation=OPPOSITE[spec.relation]))
    coloured = [i for i, group in enumerate(groups) if group.colour]
    for k, i in enumerate(coloured):
        for j in coloured[k + 1 :]:
            swapped = list(groups)
            swapped[i] = replace(groups[i], colour=groups[j].colour)
            swapped[j] = replace(groups[j], colour=groups[i].colour)
            out.append(replace(spec, groups=tuple(swapped)))
    for i, group in enumerate(groups):
        for count in (group.count - 1, group.count + 1):
            changed = (*groups[:i], replace(group, count=count), *groups[i + 1 :])
            # "a cross" is no wrong caption of two crosses, so a change must leave a number to be wrong about
            if 1 <= count <= 4 and max(g.count for g in changed) > 1 and sum(g.count for g in changed) <= 5:
                out.append(replace(spec, groups=changed))
    return out


# ---------------------------------------------------------------- how it is drawn


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points lie in `shape`; u to the right and v down, both -1..1 over its bounding square."""
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.92
    if shape == "triangle":
        return (v <= 0.9) & (abs(u) <= (v + 1) / 1.9)
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 1)
    if shape == "diamond":
        return abs(u) + abs(v) <= 1
    raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")


def coverage(thing_shape: str, half: float, x: float, y: float, size: int = IMAGE_SIZE, samples: int = 4) -> tuple:
    """Antialiased mask of one shape as (mask, y slice, x slice) of a size x size picture."""
    spans = []
    for centre in (y, x):
        low, high = max(0, int(np.floor(centre - half))), min(size, int(np.ceil(centre + half)) + 1)
        spans.append((low, high))
    axes = [(np.arange(low * samples, high * samples) + 0.5) / samples for low, high in spans]
    v, u = ((axis - centre) / half for axis, centre in zip(axes, (y, x), strict=True))
    mask = inside(thing_shape, u[None, :], v[:, None])
    rows, columns = (high - low for low, high in spans)
    mask = mask.reshape(rows, samples, columns, samples).mean((1, 3))
    return mask, slice(*spans[0]), slice(*spans[1])


def draw(scene: Scene) -> np.ndarray:
    """The scene as float32 RGB, (96, 96, 3) in 0..1."""
    *mean, angle, height = scene.background
    ramp = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE - 0.5
    slope = height * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
    image = np.asarray(mean)[None, None, :] + slope[:, :, None]
    for thing in scene.things:
        mask, rows, columns = coverage(thing.shape, SIZES[thing.size], thing.x, thing.y)
        colour = np.asarray(COLOURS[thing.colour])
        image[rows, columns] += mask[:, :, None] * (colour - image[rows, columns])
    return image.clip(0, 1).astype(np.float32)
