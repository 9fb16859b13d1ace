"""Intervals of compared pictures hold what they say, and the sentence beside them says no more than they do."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.statistics import (
    MOST_NEEDED,
    Difference,
    Unit,
    mean_interval,
    paired_difference,
    t_quantile,
    two_way_interval,
    verdict,
)

DRAWS = 1000
SHARE = Unit(percent=True)


@pytest.mark.parametrize("degrees", [1, 1.5, 2, 7, 63.2, 1000, 1e6])
@pytest.mark.parametrize("share", [0.6, 0.8, 0.975, 0.999])
def test_quantiles_are_students(share, degrees):
    assert t_quantile(share, degrees) == pytest.approx(scipy.stats.t.ppf(share, degrees), rel=1e-6)


def drawn(rng, prompts, seeds, truth=0.1, prompt_spread=0.3, seed_spread=0.5):
    """Scores of two arms, by prompt and seed, whose true difference over all prompts is `truth`."""
    own = rng.normal(truth, prompt_spread, prompts)
    plain = {(prompt, seed): float(rng.normal()) for prompt in range(prompts) for seed in range(seeds)}
    return {key: value + float(rng.normal(own[key[0]], seed_spread)) for key, value in plain.items()}, plain


@pytest.mark.parametrize(("prompts", "seeds"), [(4, 1), (8, 4), (40, 2)])
def test_coverage(prompts, seeds):
    """Of 1,000 comparisons 93 to 97% have the true difference in their interval."""
    rng = np.random.default_rng(prompts)
    held = 0
    for _ in range(DRAWS):
        found = paired_difference(*drawn(rng, prompts, seeds))
        held += found.low <= 0.1 <= found.high
    assert 0.93 <= held / DRAWS <= 0.97


def test_coverage_of_right_and_wrong():
    """Of shares too, which are no normal numbers: a picture is right in 60% of plain ones, in 70% of the others."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        ones, others = ((rng.random((40, 2)) < share).astype(float) for share in (0.7, 0.6))
        found = paired_difference(*(dict(np.ndenumerate(one)) for one in (ones, others)))
        held += found.low <= 0.1 <= found.high
    assert 0.93 <= held / DRAWS <= 0.97


def test_prompts_count_and_not_pictures():
    """Sixteen seeds that all say the same tell no more of other prompts than one does."""
    difference = (0.1, 0.3, 0.5)
    few, many = (
        paired_difference(
            {(prompt, seed): difference[prompt] for prompt in range(3) for seed in range(seeds)},
            {(prompt, seed): 0.0 for prompt in range(3) for seed in range(seeds)},
        )
        for seeds in (1, 16)
    )
    assert many.half == pytest.approx(few.half)
    assert (few.pictures, many.pictures) == (3, 48)


def test_a_difference_by_hand():
    found = paired_difference(
        {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 4.0, (2, 0): 9.0}, {(0, 0): 0.0, (0, 1): 0.0, (1, 0): 0.5}
    )
    assert found.mean == pytest.approx(2.5)  # 1.5 of the first prompt, 3.5 of the second; the third has no other
    assert found.deviation == pytest.approx(math.sqrt(2))
    assert found.half == pytest.approx(12.706, abs=1e-3)
    assert (found.prompts, found.pictures) == (2, 3)
    one = paired_difference({(0, 0): 1.0, (0, 1): 2.0}, {(0, 0): 0.0, (0, 1): 0.0})
    assert (one.mean, one.half, one.beyond(), one.needed()) == (1.5, math.inf, False, None)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(SoftREPAError, match="0 pictures of the same prompt and seed"):
        paired_difference({(0, 0): 1.0}, {(0, 1): 1.0})
    with pytest.raises(SoftREPAError, match="NaN"):
        paired_difference({(0, 0): math.nan}, {(0, 0): 1.0})


@pytest.mark.parametrize("size", [0.2, 0.5, 1.0, 3.0])
def test_so_many_prompts_see_it(size):
    """With as many prompts as it says, the effect is found in 80% of comparisons."""
    needed = Difference(size, math.inf, 1.0, 8, 8).needed()
    power = scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, needed - 1), needed - 1, size * math.sqrt(needed))
    less = scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, needed - 2), needed - 2, size * math.sqrt(needed - 1))
    assert power >= 0.78
    assert less <= 0.82


def test_the_number_is_bounded():
    assert Difference(1e-9, 1.0, 1.0, 8, 8).needed() == MOST_NEEDED
    assert Difference(0.0, 1.0, 1.0, 8, 8).needed() is None
    assert Difference(0.5, 0.0, 0.0, 8, 8).needed() == 2


def test_two_ways_by_hand():
    cells = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    mean, half = two_way_interval(cells)
    assert mean == pytest.approx(1.5)
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 1) * math.sqrt(1 / 4))  # squares 1, 1 and 1
    assert two_way_interval(cells[:1]) == (1.0, math.inf)


def test_an_interval_by_hand():
    mean, half, deviation = mean_interval(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert (mean, deviation) == (2.0, 1.0)
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 2) / math.sqrt(3))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            Difference(0.025, 0.225, 0.27, 8, 8),
            "+2.5 points (-20.0 to +25.0): nothing can be said from 8 prompts. To see an effect of this "
            "size takes about 918 prompts (80% power).",
        ),
        (Difference(0.2, 0.1, 0.1, 8, 16), "+20.0 points (+10.0 to +30.0): above strength 0, from 16 pairs"),
        (Difference(-0.2, 0.1, 0.1, 8, 16), "-20.0 points (-30.0 to -10.0): below strength 0, from 16 pairs"),
        (Difference(0.0, 0.0, 0.0, 8, 16), "+0.0 points (+0.0 to +0.0): no difference from strength 0 in 16 pairs"),
        (Difference(0.0, 0.1, 0.1, 8, 8), "+0.0 points (-10.0 to +10.0): nothing can be said from 8 prompts."),
        (Difference(0.2, math.inf, math.nan, 1, 4), "+20.0 points: nothing can be said from one of the prompts."),
        (Difference(1e-9, 1.0, 1.0, 8, 8), "takes more than 1,000,000,000 prompts (80% power)."),
    ],
)
def test_the_sentence(found, said):
    assert said in verdict(found, SHARE, "strength 0")


def test_figures_are_written_in_their_unit():
    assert [SHARE.figure(0.625), Unit().figure(0.123456)] == ["62.5%", "0.1235"]
    assert [SHARE.change(0.025), Unit().change(-0.0123456)] == ["+2.5", "-0.0123"]
