"""Drawing batches in which every caption is wrong for every image but its own."""

import heapq
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..errors import SoftREPAError, shown

EPOCHS_TRIED = 100
"""Captions are drawn anew for each epoch: how many without any batch until it is said that there are none."""


def caption_key(caption: str) -> str:
    """Captions with the same key count as equal: case, spacing and a final full stop make no other caption."""
    return " ".join(caption.casefold().split()).removesuffix(".")


@dataclass(frozen=True)
class Example:
    """One image: `size` is the training size (width, height) and so its bucket.

    `image` says what it contains, whatever its name: two examples with the same are copies of one image. It is drawn
    `repeats` times in a pass, in as many batches.
    """

    name: str
    image: str
    captions: tuple[str, ...]
    size: tuple[int, int]
    repeats: int = 1

    @cached_property
    def caption_keys(self) -> frozenset[str]:
        return frozenset(map(caption_key, self.captions))


def by_size(examples: list[Example]) -> dict[tuple[int, int], list[Example]]:
    groups: dict[tuple[int, int], list[Example]] = {}
    for one in examples:
        groups.setdefault(one.size, []).append(one)
    return dict(sorted(groups.items()))


def variety(examples: list[Example]) -> int:
    """How many different images there are, or different captions if those are fewer: no batch can be larger."""
    return min(len({one.image for one in examples}), len({key for one in examples for key in one.caption_keys}))


Drawn = tuple[Example, str]
"""An image and the caption it has in this batch."""


def epoch_batches(examples: list[Example], batch_size: int, rng: random.Random) -> list[list[Drawn]]:
    """One pass over the images in random order, each with one of its captions at random; a batch is of one size.

    An image with repeats is there as often, each time with a caption of its own, in different batches.

    What is left over in a size is not used in this pass. A size that cannot fill one batch gives a smaller one, of two
    or more.
    """
    batches = []
    for bucket in by_size(examples).values():
        repeated = [example for example in bucket for _ in range(example.repeats)]
        drawn = [(example, rng.choice(example.captions)) for example in rng.sample(repeated, len(repeated))]
        made = list(compatible_batches(drawn, batch_size))
        batches += [batch for batch in made if len(batch) == batch_size] or [batch for batch in made if len(batch) > 1]
    rng.shuffle(batches)
    return batches


def compatible_batches(drawn: list[Drawn], batch_size: int) -> Iterator[list[Drawn]]:
    """Groups in order; who does not fit into a batch waits for the next. The later ones may be short.

    One queue a caption, and a heap of who stands first in each: a caption that most images share costs no long search.
    """
    queues: dict[str, deque[tuple[int, Example, str]]] = {}
    for place, (example, caption) in enumerate(drawn):
        queues.setdefault(caption_key(caption), deque()).append((place, example, caption))
    first = [(queue[0][0], key) for key, queue in queues.items()]
    heapq.heapify(first)
    while first:
        batch: list[Drawn] = []
        members, looked_at = Members(), []
        while first and len(batch) < batch_size:
            _, key = heapq.heappop(first)
            looked_at.append(key)
            _, example, caption = queues[key][0]
            if members.accept(example, caption):
                batch.append((example, caption))
                queues[key].popleft()
        for key in looked_at:
            if queues[key]:
                heapq.heappush(first, (queues[key][0][0], key))
        yield batch


class Members:
    """What a batch holds: no image twice, and no caption that is also one of another image's captions."""

    def __init__(self):
        self.images, self.drawn, self.owned = set(), set(), set()

    def accept(self, example: Example, caption: str) -> bool:
        key = caption_key(caption)
        if example.image in self.images or key in self.owned or example.caption_keys & self.drawn:
            return False
        self.images.add(example.image)
        self.drawn.add(key)
        self.owned |= example.caption_keys
        return True


class Sampler:
    """An endless, seeded row of batches. Where it stands is four numbers."""

    def __init__(self, examples: list[Example], seed: int):
        self.examples, self.seed = examples, seed
        self.epoch, self.index, self.batch_size = 0, 0, 0
        self._batches: list[list[Drawn]] = []

    def next(self, batch_size: int) -> list[Drawn]:
        """Another batch size than before starts a new pass."""
        if batch_size != self.batch_size or self.index >= len(self._batches):
            self._start(self.epoch + 1, batch_size)
        self.index += 1
        return self._batches[self.index - 1]

    def __len__(self) -> int:
        """Batches of this pass."""
        return len(self._batches)

    def state(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "index": self.index, "batch_size": self.batch_size}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on from what `state` gave. Raises SoftREPAError for anything else: some of it would never end."""
        least = {"seed": None, "epoch": 0, "index": 0, "batch_size": 2 if state.get("epoch") else 0}
        odd = [key for key, low in least.items() if not _is_count(state.get(key), low)]
        if odd:
            raise SoftREPAError(
                f"dataset: the position of a checkpoint has {odd[0]} {shown(state.get(odd[0]))}, expected a whole "
                "number that this pack wrote."
            )
        self.seed, self.epoch, self.index, self.batch_size = (
            state[key] for key in ("seed", "epoch", "index", "batch_size")
        )
        self._batches = self._pass(self.epoch, self.batch_size) if self.epoch else []

    def _start(self, epoch: int, batch_size: int) -> None:
        for attempt in range(epoch, epoch + EPOCHS_TRIED):
            if batches := self._pass(attempt, batch_size):
                self.epoch, self.index, self.batch_size, self._batches = attempt, 0, batch_size, batches
                return
        raise SoftREPAError(
            "dataset: every image shares its captions with all the others, expected images with captions of their own."
        )

    def _pass(self, epoch: int, batch_size: int) -> list[list[Drawn]]:
        return epoch_batches(self.examples, batch_size, random.Random(f"{self.seed}/{epoch}"))


def _is_count(value: object, low: int | None) -> bool:
    return type(value) is int and (low is None or value >= low)
