"""What the next batches hold, encoded before they are drawn: a stretch of batches at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from torch import Tensor

from .batches import Example

FIRST_STRETCH, LONGEST_STRETCH = 8, 512
"""Batches of the first stretch, so that training starts soon, and of the longest: each is twice as long as the last."""

UP_FRONT = 1000
"""Images and captions: a dataset of no more is encoded before training, a larger one while it goes on."""


@dataclass(frozen=True)
class Needed:
    """What must be encoded for a batch."""

    images: list[Example]
    captions: list[str]


class Stretch(Protocol):
    """Encodings of some batches. What it does not have is encoded when it is asked for."""

    def has(self, needed: Needed) -> bool: ...

    def latent(self, example: Example) -> Tensor: ...

    def cond(self, caption: str): ...


class AtHand:
    """For encodings that are all there: a stretch of any batches."""

    def has(self, needed: Needed) -> bool:
        return True

    def ahead(self, plan: Iterable[Needed]):
        return self


class Ahead:
    """The stretch that a row of batches has got to. Its encodings go when the next one is made."""

    def __init__(self) -> None:
        self.length = FIRST_STRETCH
        self.stretch: Stretch | None = None

    def at(self, needed: Needed, encode: Callable[[Iterable[Needed]], Stretch], further: Iterator[Needed]) -> Stretch:
        """The stretch with the batch `needed`, made of it and of the `further` ones where it is not there yet."""
        if self.stretch is None or not self.stretch.has(needed):
            self.stretch = None  # before there are two
            self.stretch = encode([needed, *islice(further, self.length - 1)])
            self.length = min(2 * self.length, LONGEST_STRETCH)
        return self.stretch
