"""Which pictures a comparison draws, in which order, and which of them are shown."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from ..errors import SoftREPAError
from .records import Arm, Record, record

GROUP = 32
"""Prompts that are encoded ahead: the text encoder and the network change places in memory once for so many."""


MOST_PICTURES = 1_000_000
"""What a computer draws in a year; the list of them takes half a gigabyte."""


def plan(arms: Sequence[Arm], prompts: Sequence[str], seeds: Sequence[int]) -> list[Record]:
    """By prompt, then seed, then arm: those that are compared with each other stand together. Raises SoftREPAError."""
    check_count(len(arms), len(prompts), len(seeds))
    return [record(arm, number, text, seed) for number, text in enumerate(prompts) for seed in seeds for arm in arms]


def check_count(arms: int, prompts: int, seeds: int) -> None:
    if arms * prompts * seeds > MOST_PICTURES:
        raise SoftREPAError(
            f"{prompts:,} prompts with {seeds:,} seeds in {arms:,} arms are {arms * prompts * seeds:,} pictures, "
            f"expected at most {MOST_PICTURES:,}."
        )


def shown_of(records: Sequence[Record], arms: int, shown: int) -> list[Record]:
    """The first of a plan, at most `shown` and never a part of those that are compared; one of each arm at least."""
    return list(records[: max(1, shown // arms) * arms])


def groups(records: Sequence[Record]) -> Iterator[list[Record]]:
    """A plan, or what is left of it, in runs of at most GROUP prompts each."""
    for _, run in groupby(records, lambda one: one.prompt // GROUP):
        yield list(run)
