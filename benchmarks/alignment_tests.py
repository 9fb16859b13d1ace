"""The prompts of the study's tests, and which of a test's figures are of one caption and so belong together."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.alignment_rows import CONFIRMED, COUNTING, DEVELOPMENT, REPORTED, TESTS
from benchmarks.smallworld import checker
from benchmarks.smallworld.study import SEED, development_spec, drawn_specs, reported_spec, test_spec
from benchmarks.smallworld.tokens import BATCH_SIZE
from softrepa.smallworld.world import CATEGORIES, Spec, plain_caption


@dataclass(frozen=True)
class Asked:
    """How many prompts of each category, and what draws them from which seed."""

    prompts: dict[str, int]
    seed: int
    spec_of: Callable[[np.random.Generator, str], Spec]


def asked(test: str) -> Asked:
    categories = ("counting",) if test == COUNTING else CATEGORIES
    chosen = {DEVELOPMENT: development_spec, REPORTED: reported_spec, CONFIRMED: fresh_spec}
    number = list(TESTS).index(test)
    return Asked(dict.fromkeys(categories, TESTS[test]), SEED + 1 + 2 * number, chosen.get(test, test_spec))


TRIES = 100
"""Four of the six categories have at most 42 captions, which the other tests ask for."""


def fresh_spec(rng: np.random.Generator, category: str) -> Spec:
    """Of a caption that no other test asks for, where so many tries find one."""
    tried = [test_spec(rng, category) for _ in range(TRIES)]
    return next((spec for spec in tried if plain_caption(spec) not in asked_before()), tried[0])


@cache
def asked_before() -> set[str]:
    """Captions of all the other tests."""
    return {plain_caption(spec) for test in TESTS if test != CONFIRMED for _, spec in specs(test)}


@cache
def specs(test: str) -> list[tuple[str, Spec]]:
    """As `study.Test` draws them."""
    one = asked(test)
    return drawn_specs(np.random.default_rng(one.seed), one.prompts, one.spec_of)


def groups(test: str, of: tuple[str, ...], count: int) -> list[str] | None:
    """A label for each of the `count` figures of a measure; None where each stands alone.

    Pictures of one caption are no independent witnesses, nor are the pictures of a batch that share its captions.
    """
    if of[0] in ("retrieval", "loss"):
        return [str(place // BATCH_SIZE) for place in range(count)]
    if of[0] in ("hard_retrieval", "distance"):
        return None
    labels = [plain_caption(spec) for category, spec in specs(test) if is_measured(of, category, spec)]
    if len(labels) != count:
        raise ValueError(f"{count} figures of {'/'.join(of)}, expected one of each of {len(labels)} prompts.")
    return labels


def is_measured(of: tuple[str, ...], category: str, spec: Spec) -> bool:
    if of[0] == "right":
        return category in of[1:] or len(of) == 1
    return of[0] not in ("too_many", "too_few") or "counting" in checker.facts([], spec)


def distinct(test: str) -> int:
    """Captions."""
    return len({plain_caption(spec) for _, spec in specs(test)})
