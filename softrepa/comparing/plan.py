"""Which pictures a comparison draws, in which order, and which of them are shown."""

from collections.abc import Iterator, Sequence

from .records import Arm, Record, record

GROUP = 32
"""Prompts that are encoded ahead: the text encoder and the network change places in memory once for so many."""


def plan(arms: Sequence[Arm], prompts: Sequence[str], seeds: Sequence[int]) -> list[Record]:
    """By prompt, then seed, then arm: those that are compared with each other stand together."""
    return [record(arm, number, text, seed) for number, text in enumerate(prompts) for seed in seeds for arm in arms]


def shown_of(records: Sequence[Record], arms: int, shown: int) -> list[Record]:
    """The first of a plan, at most `shown` and never a part of those that are compared; one of each arm at least."""
    return list(records[: max(1, shown // arms) * arms])


def groups(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Runs of a plan, of GROUP prompts each; a last one of fewer prompts goes with the run before it."""
    starts = [0]
    for index, one in enumerate(records):
        if one.prompt % GROUP == 0 and records[starts[-1]].prompt != one.prompt:
            starts.append(index)
    if len(starts) > 1 and records[-1].prompt - records[starts[-1]].prompt + 1 < GROUP:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(records)], strict=True):
        yield list(records[start:end])
