"""Images with captions, encoded, in batches for contrastive training."""

import copy
import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from ..errors import SoftREPAError, shown
from .ahead import UP_FRONT, Ahead, Needed, Stretch
from .batches import Drawn, Example, Members, Sampler, by_size, compatible_batches, variety
from .swaps import sense, swaps

TRIES = 20
"""Images that are drawn for a caption that is wrong for a batch; batches, for one whose images are whole."""
SHOWN, LONGEST = 3, 80
"""Examples named in a line of the summary, and characters of each."""


class UnusableImageError(SoftREPAError):
    """An image that was there when its dataset was read, and is not any more or shows now that it is damaged."""


class DamagedImageError(UnusableImageError):
    """The file is as it was, but only its head can be read. That is so for every process that has it."""


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

    def ahead(self, plan: Iterable[Needed]) -> Stretch:
        """Encodes what the next batches need, of as many of them as have room."""


@dataclass(frozen=True)
class Batch:
    """B images and the caption of each: different images, different captions, one size.

    latents: (B, C, h, w) float32 on the CPU, as the VAE encodes them; keys: the images' names; wrong: for each image
    captions that are wrong by two swapped words, where they were asked for and there are any; further: captions of
    other images that are wrong for all of these, where they were asked for.
    """

    latents: Tensor
    captions: list[str]
    conds: list[Cond]
    keys: list[str]
    wrong: list[list[Cond]] = field(default_factory=list)
    further: list[Cond] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """A batch before it is encoded: `wrong` captions of each image, `further` ones that are wrong for all."""

    drawn: list[Drawn]
    wrong: list[list[str]]
    further: list[str]

    @property
    def needed(self) -> Needed:
        captions = [*(caption for _, caption in self.drawn), *chain(*self.wrong), *self.further]
        return Needed([example for example, _ in self.drawn], captions)


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
        self._ahead = Ahead()

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

    @cached_property
    def different_captions(self) -> int:
        """No batch can be larger: different images and different captions of one size."""
        return max(variety(group) for group in by_size(self.train).values())

    @property
    def summary(self) -> str:
        """What a person should know before training, in lines."""
        return "\n".join([*self._counted, *self.notes, *_repeated(self.train + self.validation)])

    @cached_property
    def _counted(self) -> list[str]:
        return _counted(self.train, self.validation)

    @property
    def description(self) -> str:
        """A line for the metadata of what is trained: no paths, no file names, no captions."""
        return f"{self.name}: {'; '.join(self._counted)}; fingerprint {self.fingerprint}"

    @cached_property
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
        view._sampler, view._ahead = Sampler(self.train, seed), Ahead()
        return view

    def batch(self, batch_size: int, hard_negatives: int = 0, negatives: int = 0, left: int = 1) -> Batch:
        """The next training batch; smaller only where a bucket has fewer than `batch_size` images and captions.

        With up to `hard_negatives` wrong captions for each image. Where an image is to be compared with more wrong
        captions, `negatives`, than the batch has, further ones are drawn, up to as many as there are. `left` batches,
        with this one, are still to be drawn at most: some of them are encoded together.

        A batch with an image that turns out to be damaged is left out, and the next one drawn.
        """
        self._check_batch_size(batch_size)
        asked = (batch_size, hard_negatives, negatives)
        for _ in range(TRIES):
            plan = self._plan(self._sampler, *asked)
            following = copy.copy(self._sampler)
            further = (self._plan(following, *asked).needed for _ in range(left - 1))
            try:
                return self._encoded(plan, self._ahead.at(plan.needed, self.encodings.ahead, further))
            except DamagedImageError as error:
                logging.warning("SoftREPA: a batch is left out: %s", error)
                found = error
        raise found

    def one_epoch(self, batch_size: int, most: int | None = None) -> Iterator[Batch]:
        """Batches as `batch` gives them from the start, `most` at most, each image once whatever its repeats."""
        self._check_batch_size(batch_size)
        once = [replace(one, repeats=1) if one.repeats > 1 else one for one in self.train]
        sampler = Sampler(once, self.state()["seed"])
        drawn = [sampler.next(batch_size)]
        while sampler.index < len(sampler) and len(drawn) != most:
            drawn.append(sampler.next(batch_size))
        yield from self._all_encoded(drawn)

    def first_latent(self) -> Tensor:
        """(C, h, w) float32 of the first training image that is not damaged."""
        for example in self.train[:-1]:
            with suppress(DamagedImageError):
                return self.encodings.latent(example)
        return self.encodings.latent(self.train[-1])

    def prepare_hard_negatives(self) -> str:
        """Encodes every wrong caption that training can draw, unless they are many; says in a line what was done.

        Raises SoftREPAError where there are none.
        """
        if sum(len(one.captions) for one in self.train) > UP_FRONT:
            self.encodings.prepare([])
            if any(wrong_captions(one, caption) for one in self.train for caption in one.captions):
                return "hard negatives are made and encoded while training, a stretch of steps ahead"
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

    def validation_batches(self, batch_size: int, most: int | None = None) -> Iterator[Batch]:
        """Every validation image once, always in the same batches, `most` at most; each has its first caption.

        The last batches may be smaller, down to two; who finds no partner is left out.
        """
        batches = (
            drawn
            for bucket in by_size(self.validation).values()
            for drawn in compatible_batches([(example, example.captions[0]) for example in bucket], batch_size)
            if len(drawn) > 1
        )
        yield from self._all_encoded(list(islice(batches, most)))

    def _all_encoded(self, batches: list[list[Drawn]]) -> Iterator[Batch]:
        ahead, plans = Ahead(), [Plan(drawn, [[] for _ in drawn], []) for drawn in batches]
        for place, plan in enumerate(plans):
            following = (one.needed for one in plans[place + 1 :])
            try:
                yield self._encoded(plan, ahead.at(plan.needed, self.encodings.ahead, following))
            except DamagedImageError as error:
                logging.warning("SoftREPA: a batch is left out: %s", error)

    def _plan(self, sampler: Sampler, batch_size: int, hard_negatives: int, negatives: int) -> Plan:
        """Moves `sampler` on by a batch. Where it stands then decides the rest: a run that is gone on with draws the
        same.
        """
        drawn = sampler.next(batch_size)
        rng = random.Random(repr(sampler.state()))
        found = [wrong_captions(*one) if hard_negatives else [] for one in drawn]
        wrong = [rng.sample(captions, min(hard_negatives, len(captions))) for captions in found]
        more = max(0, negatives - len(drawn) + 1)
        return Plan(drawn, wrong, further_captions(self.train, drawn, more, rng))

    def _encoded(self, plan: Plan, stretch: Stretch) -> Batch:
        drawn = plan.drawn
        return Batch(
            latents=torch.stack([stretch.latent(example) for example, _ in drawn]).float(),
            captions=[caption for _, caption in drawn],
            conds=[stretch.cond(caption) for _, caption in drawn],
            keys=[example.name for example, _ in drawn],
            wrong=[[stretch.cond(caption) for caption in captions] for captions in plan.wrong],
            further=[stretch.cond(caption) for caption in plan.further],
        )

    def _check_batch_size(self, batch_size: int) -> None:
        if not 2 <= batch_size <= self.different_captions:
            raise SoftREPAError(
                f"batch_size is {batch_size}, expected 2 to {self.different_captions}: {self.label} has no more "
                "different images and captions of one size."
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


def further_captions(examples: list[Example], drawn: list[Drawn], count: int, rng: random.Random) -> list[str]:
    """`count` captions of other images, no two equal, that are wrong for all of a batch; fewer where there are no more.

    They are drawn at random; where that finds too few, all images are gone through.
    """
    members = Members()
    found: list[str] = []
    for one in drawn:
        members.accept(*one)
    places = (rng.randrange(len(examples)) for _ in range(TRIES * count))
    for place in chain(places, range(len(examples))):
        if len(found) >= count:
            break
        example = examples[place]
        caption = rng.choice(example.captions)
        if members.accept(example, caption):
            found.append(caption)
    return found


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
