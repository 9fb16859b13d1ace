"""The prompts of the study's tests, and which of a test's figures are of one caption and so belong together."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

import numpy as np

from benchmarks.alignment_rows import CONFIRMED, COUNTING, DEVELOPMENT, REPORTED, TESTS
from benchmarks.smallworld import checker
from benchmarks.smallworld.study import BATCH, SEED, development_spec, drawn_specs, reported_spec, test_spec
from benchmarks.smallworld.tokens import BATCH_SIZE
from softrepa.smallworld.world import CATEGORIES, Spec, plain_caption


@dataclass(frozen=True)
class Asked:
    """How many prompts of each category, what draws them from which seed; `noise` and `batch` as in `study.Test`."""

    prompts: dict[str, int]
    seed: int
    spec_of: Callable[[np.random.Generator, str], Spec] = test_spec
    noise: int = 0
    batch: int = BATCH


FRESH = ("position", "colour_attribution")
"""Categories with hundreds of captions; each of the others has at most 42, and the tests ask for nearly all of them."""


def fresh_spec(rng: np.random.Generator, category: str) -> Spec:
    """In these of a caption that no test before CONFIRMED asks for."""
    while plain_caption(spec := test_spec(rng, category)) in asked_before() and category in FRESH:
        pass
    return spec


@cache
def asked_before() -> set[str]:
    return {plain_caption(spec) for test in takewhile(CONFIRMED.__ne__, TESTS) for _, spec in specs(test)}


NOISE_OF_ITS_OWN = {DEVELOPMENT: development_spec, REPORTED: reported_spec, CONFIRMED: fresh_spec}
"""Such tests, by what draws their captions."""


def asked(test: str) -> Asked:
    prompts = dict.fromkeys(("counting",) if test == COUNTING else CATEGORIES, TESTS[test])
    number = list(TESTS).index(test)
    seed = SEED + 1 + 2 * number
    if test in NOISE_OF_ITS_OWN:
        return Asked(prompts, seed, NOISE_OF_ITS_OWN[test], noise=1000 * number, batch=60)
    return Asked(prompts, seed)


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
