"""Images with captions, encoded, in batches for contrastive training."""

import copy
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from ..errors import SoftREPAError, shown
from .batches import Drawn, Example, Sampler, by_size, compatible_batches, variety
from .swaps import sense, swaps

SHOWN, LONGEST = 3, 80
"""Examples named in a line of the summary, and characters of each."""


class PlainCond(TypedDict):
    """What every text encoder gives of a caption: `cross_attn` (1, N, d) and `pooled_output`, (1, p) or None."""

    cross_attn: Tensor
    pooled_output: Tensor | None


class Cond(PlainCond, total=False):
    """One caption as the text encoder gave it; `rest` is what some give besides, masks and ids, by name."""

    rest: dict[str, Tensor]


class Encodings(Protocol):
    """Where latents and conds come from. Latents are the VAE's own: the model's `process_latent_in` is not applied."""

    @property
    def identity(self) -> str:
        """Changes with what encodes; data that comes encoded is known by itself."""

    @property
    def empty(self) -> Cond:
        """The encoding of the empty caption."""

    def latent(self, example: Example) -> Tensor:
        """(C, h, w) float32 on the CPU."""

    def cond(self, caption: str) -> Cond:
        """On the CPU."""

    def prepare(self, captions: list[str]) -> str:
        """Encodes these too, ahead of their use; says in a line what lies where.

        Raises SoftREPAError where there is no text.
        """


@dataclass(frozen=True)
class Batch:
    """B images and the caption of each: different images, different captions, one size.

    latents: (B, C, h, w) float32 on the CPU, as the VAE encodes them; keys: the images' names; wrong: for each image
    captions that are wrong by two swapped words, where they were asked for and there are any.
    """

    latents: Tensor
    captions: list[str]
    conds: list[Cond]
    keys: list[str]
    wrong: list[list[Cond]] = field(default_factory=list)


class Dataset:
    """Training and validation images. `started(seed)` gives a view with a position of its own."""

    def __init__(
        self, name: str, train: list[Example], validation: list[Example], encodings: Encodings, notes: list[str]
    ):
        self.name, self.train, self.validation = name, train, validation
        self.encodings, self.notes = encodings, notes
        self.settings: dict = {}
        """The inputs it was made with, by name."""
        self._check("training", train)
        if validation:
            self._check("validation", validation)
        self._sampler = Sampler(train, seed=0)

    def __len__(self) -> int:
        """Training images."""
        return len(self.train)

    @property
    def label(self) -> str:
        return f'Dataset "{shown(self.name)}"'

    @property
    def empty(self) -> Cond:
        """The encoding of the empty caption."""
        return self.encodings.empty

    @property
    def different_captions(self) -> int:
        """No batch can be larger: different images and different captions of one size."""
        return max(variety(group) for group in by_size(self.train).values())

    @property
    def summary(self) -> str:
        """What a person should know before training, in lines."""
        counted = _counted(self.train, self.validation)
        return "\n".join([*counted, *_repeated(self.train + self.validation), *self.notes])

    @property
    def description(self) -> str:
        """A line for the metadata of what is trained: no paths, no file names, no captions."""
        return f"{self.name}: {'; '.join(_counted(self.train, self.validation))}; fingerprint {self.fingerprint}"

    @property
    def fingerprint(self) -> str:
        """Changes with any image, caption, size, repeats, their order, or the division into training and validation."""
        parts = [
            [_facts(one) for one in part]  # drawing goes by this order
            for part in (self.train, self.validation)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def started(self, seed: int) -> "Dataset":
        """The same data, drawn from the start by `seed`; the position of this one does not move."""
        view = copy.copy(self)
        view._sampler = Sampler(self.train, seed)
        return view

    def batch(self, batch_size: int, hard_negatives: int = 0) -> Batch:
        """The next training batch; smaller only where a bucket has fewer than `batch_size` images and captions.

        With up to `hard_negatives` wrong captions for each image.
        """
        if not 2 <= batch_size <= self.different_captions:
            raise SoftREPAError(
                f"batch_size is {batch_size}, expected 2 to {self.different_captions}: {self.label} has no more "
                "different images and captions of one size."
            )
        drawn = self._sampler.next(batch_size)
        return self._encoded(drawn, self._wrong(drawn, hard_negatives) if hard_negatives else None)

    def one_epoch(self, batch_size: int) -> Iterator[Batch]:
        """Batches as `batch` gives them from the start, each image once whatever its repeats."""
        view = copy.copy(self)
        view._sampler = Sampler([replace(one, repeats=1) for one in self.train], self.state()["seed"])
        yield view.batch(batch_size)
        epoch = view.state()["epoch"]
        drawn = view._sampler.next(batch_size)
        while view.state()["epoch"] == epoch:
            yield self._encoded(drawn)
            drawn = view._sampler.next(batch_size)

    def prepare_hard_negatives(self) -> str:
        """Encodes every wrong caption that training can draw; says in a line how many there are.

        Raises SoftREPAError where there are none.
        """
        made = {caption: wrong_captions(one, caption) for one in self.train for caption in one.captions}
        captions = sorted({wrong for found in made.values() for wrong in found})
        prepared = self.encodings.prepare(captions)
        if not captions:
            raise SoftREPAError(
                f"{self.label} has no caption with two words to swap, expected some, or hard_negatives 0."
            )
        without = sum(not found for found in made.values())
        return f"{len(captions)} hard negatives, none for {without} of {len(made)} captions: {prepared}"

    def state(self) -> dict[str, int]:
        """Where the drawing stands."""
        return self._sampler.state()

    def restore(self, state: dict[str, int]) -> None:
        """Goes on drawing as if from `state`, on the same images."""
        self._sampler.restore(state)

    def validation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every validation image once, always in the same batches; each image has its first caption.

        The last batches may be smaller, down to two; who finds no partner is left out.
        """
        for bucket in by_size(self.validation).values():
            for drawn in compatible_batches([(example, example.captions[0]) for example in bucket], batch_size):
                if len(drawn) > 1:
                    yield self._encoded(drawn)

    def _wrong(self, drawn: list[Drawn], count: int) -> list[list[Cond]]:
        rng = random.Random(repr(self.state()))  # a run that is gone on with draws the same
        found = [wrong_captions(*one) for one in drawn]
        chosen = [rng.sample(captions, min(count, len(captions))) for captions in found]
        return [[self.encodings.cond(caption) for caption in captions] for captions in chosen]

    def _encoded(self, drawn: list[Drawn], wrong: list[list[Cond]] | None = None) -> Batch:
        return Batch(
            latents=torch.stack([self.encodings.latent(example) for example, _ in drawn]).float(),
            captions=[caption for _, caption in drawn],
            conds=[self.encodings.cond(caption) for _, caption in drawn],
            keys=[example.name for example, _ in drawn],
            wrong=wrong or [[] for _ in drawn],
        )

    def _check(self, part: str, examples: list[Example]) -> None:
        images = len({one.image for one in examples})
        captions = len({key for one in examples for key in one.caption_keys})
        if images < 2 or captions < 2:
            raise SoftREPAError(
                f"{self.label} has {images} different images and {captions} different captions for {part}, "
                "expected at least two of each: the captions of other images are what an image is compared with"
                + ("; validation_percent divides them." if self.validation else ".")
            )


def wrong_captions(example: Example, caption: str) -> list[str]:
    """Swaps of `caption` that say what none of the image's own captions says."""
    right = {sense(own) for own in example.captions}
    return [one for one in swaps(caption) if sense(one) not in right]


def divide(examples: list[Example], validation_percent: float) -> tuple[list[Example], list[Example]]:
    """Training and validation. What an image contains decides, so copies of one stay together, whatever their names."""
    order = sorted({one.image for one in examples}, key=lambda image: hashlib.sha256(image.encode()).digest())
    count = max(2, round(len(order) * validation_percent / 100)) if validation_percent else 0  # one alone is no choice
    held_out = set(order[:count])
    train = [one for one in examples if one.image not in held_out]
    return train, [one for one in examples if one.image in held_out]


def _facts(example: Example) -> list:
    """What of an example decides a run: repeats only where there are any, as they were not always known."""
    facts = [example.image, list(example.captions), list(example.size)]
    return facts if example.repeats == 1 else [*facts, example.repeats]


def _counted(train: list[Example], validation: list[Example]) -> list[str]:
    examples = train + validation
    captions = sum(len(one.captions) for one in examples)
    different = len({key for one in examples for key in one.caption_keys})
    lines = [f"{len(examples)} images, {captions} captions ({different} different)"]
    drawn = sum(one.repeats for one in train)
    if drawn != len(train):
        lines.append(f"{drawn} images in a pass, by the repeats that folders are named with")
    if validation:
        lines.append(f"{len(train)} for training, {len(validation)} for validation")
    sizes = [f"{width}x{height} ({len(group)})" for (width, height), group in by_size(examples).items()]
    return [*lines, f"trained at {', '.join(sizes)}"]


def _repeated(examples: list[Example]) -> list[str]:
    """Captions and images that occur more than once, in lines."""
    keys = Counter(key for one in examples for key in one.caption_keys)
    copies = [image for image, count in Counter(one.image for one in examples).items() if count > 1]
    lines = []
    shared = [key for key, count in keys.items() if count > 1]
    if shared:
        shared.sort(key=keys.__getitem__, reverse=True)
        named = named_examples([f'"{shown(key, LONGEST // 2)}" ({keys[key]} images)' for key in shared])
        lines.append(f"{len(shared)} captions of several images, which never meet in a batch: {named}")
    if copies:
        names = [" = ".join(one.name for one in examples if one.image == image) for image in copies[:SHOWN]]
        lines.append(f"{len(copies)} images in several copies: {named_examples(names, len(copies))}")
    return lines


def named_examples(names: list[str], total: int | None = None) -> str:
    """The first few of `names`, and a sign that there are more."""
    more = ", ..." if (total or len(names)) > SHOWN else ""
    return ", ".join(shown(name, LONGEST) for name in names[:SHOWN]) + more
