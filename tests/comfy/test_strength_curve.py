"""Strength over the sampling: at each step what strength times the curve is, and nothing else."""

import numpy as np
import pytest
import torch
from comfy_api.input import CurveInput
from comfyui_softrepa.softrepa.comfy.comparing.run import _settings_of
from comfyui_softrepa.softrepa.comfy.families.noising import percent
from comfyui_softrepa.softrepa.comfy.tokens.patching import KEY, apply_tokens, share_of_strength
from comfyui_softrepa.softrepa.errors import SoftREPAError
from hypothesis import given
from hypothesis import strategies as st
from softrepa_tests.editing import edit
from softrepa_tests.properties import bounded
from softrepa_tests.sampling import guider, noise, record, relative_error, sigmas_of
from softrepa_tests.token_sets import tokens_for

FAMILIES = ("sd15", "sd3", "flux")
FALLING = {"points": [[0, 1], [0.3, 1], [0.7, 0], [1, 0]], "interpolation": "linear"}
EARLY = {"points": [[0, 1], [0.5, 1], [0.500001, 0], [1, 0]], "interpolation": "linear"}
LATE = {"points": [[0, 0], [0.499999, 0], [0.5, 1], [1, 1]], "interpolation": "linear"}
EXACT = 1e-5
shares = st.floats(0, 1)


def curve_of(model):
    return model.get_attachment(KEY).sets[-1].curve


@pytest.mark.parametrize("family", FAMILIES)
def test_percent_is_the_inverse_of_comfyuis(models, family):
    sampling = models[family].get_model_object("model_sampling")
    for share in np.linspace(0, 1, 101)[1:-1]:
        sigma = torch.tensor(sampling.percent_to_sigma(share))
        assert percent(sampling, sigma) == pytest.approx(share, abs=1e-6)
    assert percent(sampling, sampling.sigma_max) == percent(sampling, 2 * sampling.sigma_max) == 0
    assert percent(sampling, torch.tensor(0.0)) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_is_that_of_its_strength(models, family):
    model, tokens, x = models[family], tokens_for(family), noise(family)
    sigmas = sigmas_of(model, 7)
    ours = record(guider(apply_tokens(model, tokens, strength=0.8, strength_curve=FALLING), family), x, sigmas)
    sampling = model.get_model_object("model_sampling")
    found = []
    for step, sigma in enumerate(sigmas[:-1]):
        share = np.interp(percent(sampling, sigma), *zip(*FALLING["points"], strict=True))
        fixed = apply_tokens(model, tokens, strength=0.8 * round(share, 6))
        expected = record(guider(fixed, family), x, sigmas[step:])[0]
        assert relative_error(ours[step], expected) <= EXACT, step
        found.append(share)
    assert found[0] == 1 and found[-1] == 0
    assert any(0 < share < 1 for share in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_1_nothing_is_weighed_and_at_0_the_model_is_plain(models, family):
    model, tokens, x = models[family], tokens_for(family), noise(family)
    sigmas = sigmas_of(model, 6)
    plain, full, ours = (
        record(guider(one, family), x, sigmas)
        for one in (model, apply_tokens(model, tokens), apply_tokens(model, tokens, strength_curve=EARLY))
    )
    is_plain = [torch.equal(one, expected) for one, expected in zip(ours, plain, strict=True)]
    is_full = [torch.equal(one, expected) for one, expected in zip(ours, full, strict=True)]
    assert [not one for one in is_plain] == is_full
    assert 0 < sum(is_full) < len(is_full)


@pytest.mark.parametrize("family", FAMILIES)
def test_sets_roles_and_windows_have_curves_of_their_own(models, family):
    """A curve that is 1 up to the middle is the window that ends there, beside another set with its own."""
    first, second = tokens_for(family, "a"), tokens_for(family, "b")
    sigmas, x = sigmas_of(models[family], 6), noise(family)
    sampling = models[family].get_model_object("model_sampling")
    assert all(abs(percent(sampling, sigma) - 0.5) > 1e-3 for sigma in sigmas)

    def both(early: dict, late: dict):
        model = apply_tokens(models[family], first, strength=3.0, apply_to="positive", **early)
        return apply_tokens(model, second, apply_to="negative", end_percent=0.9, **late)

    drawn = record(guider(both({"strength_curve": EARLY}, {"strength_curve": LATE}), family), x, sigmas)
    windowed = record(guider(both({"end_percent": 0.5}, {"start_percent": 0.5}), family), x, sigmas)
    for ours, expected in zip(drawn, windowed, strict=True):
        assert torch.equal(ours, expected)


def test_flowedit_follows_the_curve(models):
    model, tokens = models["sd3"], tokens_for("sd3")
    assert torch.equal(
        edit(apply_tokens(model, tokens, strength_curve=EARLY), "sd3"),
        edit(apply_tokens(model, tokens, end_percent=0.5), "sd3"),
    )
    half = edit(apply_tokens(model, tokens, strength_curve=FALLING), "sd3")
    assert relative_error(half, edit(apply_tokens(model, tokens), "sd3")) > 1e-4


@bounded
@given(st.lists(st.tuples(shares, st.floats(0, 10)), min_size=1, max_size=6), shares, st.sampled_from(("linear", "")))
def test_it_is_comfyuis_curve_and_never_below_0(models, points, share, interpolation):
    raw = {"points": points, "interpolation": interpolation or "monotone_cubic"}
    curve = curve_of(apply_tokens(models["sd3"], tokens_for("sd3"), strength_curve=raw))
    assert curve.at(share) == pytest.approx(CurveInput.from_raw(raw).interp(share), abs=1e-6)
    assert curve.at(share) >= 0


@pytest.mark.parametrize(
    ("curve", "found"),
    [
        ({"points": [[0, 1], [1, -0.5]]}, "strength_curve: y of a point is -0.5, expected 0 or more"),
        ({"points": [[0, 1], [1.5, 0]]}, "strength_curve: x of a point is 1.5, expected 0 to 1"),
        ({"points": [[0, float("nan")], [1, 0]]}, "strength_curve: y of a point is nan"),
        ({"points": [[0, 1], [1, float("inf")]]}, "strength_curve: y of a point is inf"),
        ({"points": []}, "strength_curve has no points, expected at least one"),
        ({"lines": 3}, "strength_curve is {'lines': 3}, expected what ComfyUI's Curve Editor gives"),
        ("falling", "strength_curve is falling, expected what ComfyUI's Curve Editor gives"),
        (0.5, "strength_curve is 0.5, expected what"),
    ],
)
def test_what_is_no_curve_is_refused(models, curve, found):
    for strength in (1.0, 0.0):
        with pytest.raises(SoftREPAError) as caught:
            apply_tokens(models["sd3"], tokens_for("sd3"), strength=strength, strength_curve=curve)
        assert found in str(caught.value)


class Wave(CurveInput):
    """Another node's, which does not go through its points."""

    points = ((0.0, 1.0), (1.0, 1.0))

    def interp(self, x):
        return 1 - 3 * x


def test_another_nodes_curve_is_refused_where_it_falls_below_0(models):
    patched = apply_tokens(models["sd3"], tokens_for("sd3"), strength_curve=Wave())
    with pytest.raises(SoftREPAError, match=r"strength_curve at .* is -.*, expected 0 or more"):
        record(guider(patched, "sd3"), noise("sd3"), sigmas_of(patched, 4))


def test_a_compared_picture_is_named_by_its_curve(models):
    def named(**options) -> list:
        (one,) = apply_tokens(models["sd3"], tokens_for("sd3"), **options).get_attachment(KEY).sets
        return _settings_of(one)

    curved = [named(strength_curve=one) for one in (FALLING, EARLY, FALLING | {"interpolation": "monotone_cubic"})]
    assert all(one not in curved[:index] for index, one in enumerate(curved))
    assert curved[0] == named(strength_curve=FALLING)
    assert curved[0][: len(named())] == named()


def test_a_window_takes_what_is_outside_of_it(models):
    always = {"points": [[0, 0.5]]}
    model = apply_tokens(models["sd3"], tokens_for("sd3"), start_percent=0.4, strength_curve=always)
    sampling = model.get_model_object("model_sampling")
    (one,) = model.get_attachment(KEY).sets
    at = [share_of_strength(one, sampling, torch.tensor([sampling.percent_to_sigma(p)])) for p in (0.3, 0.5)]
    assert at == [0, 0.5]


def test_under_torch_compile_every_call_inserts_and_weighs(models):
    """A compiled network may not see whether it does."""
    patch = apply_tokens(models["sd3"], tokens_for("sd3"), strength_curve=EARLY).get_attachment(KEY)
    model = models["sd3"].model
    for share in (0.2, 0.8):
        sigma = torch.tensor([model.model_sampling.percent_to_sigma(share)])
        state = patch.state(model, sigma, [False], is_fixed=True)
        assert state.rows.keys() == state.bias.keys() != set()
