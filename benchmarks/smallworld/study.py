"""What the study of soft tokens trains on, what it tests, and how: scenes apart, one figure a picture."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from softrepa.smallworld.pictures import write_pictures
from softrepa.smallworld.world import (
    CATEGORIES,
    COLOURS,
    IMAGE_SIZE,
    NUMBERS,
    SHAPES,
    Spec,
    draw,
    plain_caption,
    random_scene,
    random_spec,
)

from . import checker
from .measure import SAMPLING, StockModel
from .tokens import HeldOut

SEED = 2026
BATCH = 12  # pictures sampled at once; their noise depends on it
DECODED = 6  # at once: of more, on a CPU, each takes longer
CELLS = 12  # a picture is compared with others as CELLS x CELLS mean colours


def is_held_out(spec: Spec) -> bool:
    """Whether `spec` says something that no training caption says.

    Of 35 colours of shapes 7 are held out, of 15 numbers of shapes 3, of 10 pairs of shapes in one caption 2.
    """
    shape, colour = SHAPES.index, list(COLOURS).index
    coloured = [(shape(group.shape) + colour(group.colour)) % 5 == 0 for group in spec.groups if group.colour]
    counted = [(shape(group.shape) + group.count) % 5 == 0 for group in spec.groups if group.count > 1]
    pairs = [(shape(a.shape) + shape(b.shape)) % 5 == 0 for a, b in combinations(spec.groups, 2)]
    return any((*coloured, *counted, *pairs))


def training_spec(rng: np.random.Generator, category: str) -> Spec:
    while is_held_out(spec := random_spec(rng, category)):
        pass
    return spec


def test_spec(rng: np.random.Generator, category: str) -> Spec:
    """Of "single_object" nothing is held out: a shape is all that such a caption says."""
    while not is_held_out(spec := random_spec(rng, category)) and category != "single_object":
        pass
    return spec


def is_for_development(spec: Spec) -> bool:
    """About half of all captions: on them settings are chosen, on the others the chosen ones are reported."""
    return crc32(plain_caption(spec).encode()) % 2 == 0


def development_spec(rng: np.random.Generator, category: str) -> Spec:
    while not is_for_development(spec := test_spec(rng, category)):
        pass
    return spec


def reported_spec(rng: np.random.Generator, category: str) -> Spec:
    while is_for_development(spec := test_spec(rng, category)):
        pass
    return spec


def other_numbers(caption: str) -> list[str]:
    """`caption` with another number in place of one that it says: captions that are wrong by that alone.

    From two to four of them, so that the shape's word stays as it is.
    """
    numbers = [NUMBERS[count] for count in (2, 3, 4)]
    words = caption.split(" ")
    return [
        " ".join([*words[:place], other, *words[place + 1 :]])
        for place, word in enumerate(words)
        for other in numbers
        if word in numbers and other != word
    ]


def drawn_specs(
    rng: np.random.Generator, prompts: dict[str, int], spec_of: Callable[[np.random.Generator, str], Spec]
) -> list[tuple[str, Spec]]:
    """So many of each category."""
    return [(name, spec_of(rng, name)) for name, count in prompts.items() for _ in range(count)]


def write_training_folder(folder: Path, pictures: int) -> None:
    write_pictures(folder, pictures, SEED, training_spec)


@dataclass
class Measured:
    """Of one model, picture by picture in an order that never changes; what a picture does not show is absent.

    right: all that a prompt says, by its category; facts: single ones, by kind, NaN where the prompt says none of that
    kind; unasked: how many things more than the prompt says there are in all (below 0: fewer); surplus: how many of
    its shape, of prompts that say a number; margin: how near a verdict is to the other one, `checker.margin`; clean:
    the share of a picture's things that have a known shape and colour; loss, retrieval, hard_retrieval: see
    `tokens.Alignment`; distance: of all generated pictures to drawn ones, see `distance`.
    """

    right: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, list[float]] = field(default_factory=dict)
    unasked: list[float] = field(default_factory=list)
    surplus: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    clean: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    retrieval: list[float] = field(default_factory=list)
    hard_retrieval: list[float] = field(default_factory=list)
    distance: float = 0.0

    def as_json(self) -> dict:
        return {one.name: short(getattr(self, one.name)) for one in fields(self)}


def held_out(stock: StockModel, batches: int, hard: int, seed: int) -> HeldOut:
    return HeldOut(stock, batches, hard, seed, spec_of=test_spec)


class Test:
    """Prompts, and held-out pictures if any, with noise that stays the same for every model.

    `prompts` is how many of each category, `spec_of` draws one of a category; `noise` is the seed of the first
    of the batches.
    """

    def __init__(
        self,
        stock: StockModel,
        prompts: dict[str, int],
        seed: int,
        held_out: HeldOut | None = None,
        spec_of: Callable[[np.random.Generator, str], Spec] = test_spec,
        noise: int = 0,
        batch: int = BATCH,
    ):
        self.stock, self.held_out, self.noise, self.batch = stock, held_out, noise, batch
        rng = np.random.default_rng(seed)
        self.prompts = drawn_specs(rng, prompts, spec_of)
        scenes = (np.stack([draw(random_scene(rng, spec)) for _ in range(4)]) for _, spec in self.prompts)
        self.drawn = np.concatenate([small(pictures) for pictures in scenes])

    def measure(self, model, temperature: float, cfg: float) -> Measured:
        """Of a MODEL, with tokens or without. `temperature` is that of the loss; `cfg` the guidance."""
        found = self.facts(self.pictures(model, cfg))
        if self.held_out is None:
            return found
        alignment = self.held_out.measure(model, temperature)
        for name in ("loss", "retrieval", "hard_retrieval"):
            setattr(found, name, getattr(alignment, name).tolist())
        return found

    def facts(self, pictures: np.ndarray) -> Measured:
        right, facts, unasked, surplus, margin, clean = defaultdict(list), [], [], [], [], []
        for (category, spec), picture in zip(self.prompts, pictures, strict=True):
            things = checker.find(picture)
            facts.append(checker.facts(things, spec))
            right[category].append(float(all(facts[-1].values())))
            unasked.append(checker.unasked(things, spec))
            margin.append(checker.margin(things, spec))
            if "counting" in facts[-1]:
                surplus.append(checker.surplus(things, spec)[0])  # such a prompt names one shape
            known = [thing.shape is not None and thing.colour is not None for thing in things]
            clean.append(sum(known) / len(known) if known else 0.0)
        kinds = dict.fromkeys(kind for verdict in facts for kind in verdict)
        by_kind = {kind: [float(verdict.get(kind, np.nan)) for verdict in facts] for kind in kinds}
        return Measured(
            dict(right), by_kind, unasked, surplus, margin, clean, distance=distance(small(pictures), self.drawn)
        )

    def row(self, model, cfg: float, each: int) -> list[tuple[np.ndarray, str, bool]]:
        """Pictures of the first `each` prompts of every category, their captions, and whether they are right."""
        prompts = [one for name in CATEGORIES for one in [one for one in self.prompts if one[0] == name][:each]]
        pictures = self.pictures(model, cfg, prompts)
        return [
            (picture, plain_caption(spec), checker.correct(picture, spec))
            for (_, spec), picture in zip(prompts, pictures, strict=True)
        ]

    def pictures(self, model, cfg: float, prompts: list[tuple[str, Spec]] | None = None) -> np.ndarray:
        """One of each of `prompts`, or of all, float32 (N, H, W, 3)."""
        specs = [spec for _, spec in prompts or self.prompts]
        return pictures(self.stock, model, cfg, specs, self.noise, self.batch)


@torch.inference_mode()
def pictures(
    stock: StockModel, model, cfg: float, specs: Sequence[Spec], noise: int = 0, batch: int = BATCH
) -> np.ndarray:
    """One of each, float32 (N, H, W, 3). `noise` is the seed of the first batch."""
    nodes, drawn = stock.nodes, []
    texts = [plain_caption(spec) for spec in specs]
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        latent = {"samples": torch.zeros(len(some), 16, IMAGE_SIZE // 8, IMAGE_SIZE // 8)}
        prompt = {"positive": stock.encode_all(some), "negative": stock.negative}
        out = nodes.KSampler().sample(model, noise + start, latent_image=latent, **prompt, **SAMPLING | {"cfg": cfg})[0]
        for part in out["samples"].split(DECODED):
            decoded = nodes.VAEDecode().decode(stock.vae, out | {"samples": part})[0]
            drawn.append(decoded.float().clamp(0, 1).cpu().numpy())
    return np.concatenate(drawn)


def short(value):
    """Five digits, whole numbers without a point."""
    if isinstance(value, dict):
        return {key: short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [short(part) for part in value]
    return int(value) if value in (0, 1) else round(value, 5)


def small(pictures: np.ndarray) -> np.ndarray:
    """Mean colours (N, CELLS * CELLS * 3) in -1..1."""
    side = IMAGE_SIZE // CELLS
    cells = pictures.reshape(len(pictures), CELLS, side, CELLS, side, 3).mean((2, 4))
    return 2 * cells.reshape(len(pictures), -1) - 1


def distance(generated: np.ndarray, drawn: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with a cubic kernel (as KID, arXiv 1801.01401), times 1000."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        inner = kernel(a, a)
        return (inner.sum() - np.trace(inner)) / (len(a) * (len(a) - 1))

    return 1000 * float(within(generated) + within(drawn) - 2 * kernel(generated, drawn).mean())
