"""Soft tokens beside what other packs do to attention and its contexts: the right result, or one sentence."""

import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfyui_softrepa.softrepa.comfy.tokens.attention import SoftKeyBias
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.errors import SoftREPAError
from softrepa_tests import foreign
from softrepa_tests.oracle import injected
from softrepa_tests.sampling import prompt, relative_error, sample
from softrepa_tests.tiny_models import LENGTH, WIDTH, seeded
from softrepa_tests.token_sets import tokens_for

EXACT = 1e-5
WEIGHED = [{"strength": 0.3}, {"strength": 3.0}, {"apply_to": "positive"}]


def in_both_orders(model, tokens, change, **options):
    return apply_tokens(change(model), tokens, **options), change(apply_tokens(model, tokens, **options))


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("change", [foreign.drops_masks, foreign.refuses_masks])
@pytest.mark.parametrize("options", WEIGHED)
def test_an_override_that_takes_no_masks(models, family, change, options):
    model, tokens = models[family], tokens_for(family)
    expected = sample(apply_tokens(model, tokens, **options), family)
    assert relative_error(sample(apply_tokens(model, tokens), family), expected) > 1e-4
    for patched in in_both_orders(model, tokens, change, **options):
        assert relative_error(sample(patched, family), expected) <= EXACT


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("scale", [1.5, 0.5])
def test_an_override_that_heeds_masks_goes_on_being_used(models, family, scale):
    masks = []

    def override(func, q, k, v, heads, mask=None, **rest):
        masks.append(mask is not None and not mask.isinf().any())  # infinite: when it is asked
        return func(q, k, v * scale, heads, mask=mask, **rest)

    def change(model):
        return foreign.with_override(model, override)

    model, tokens = models[family], tokens_for(family)
    with injected(model, tokens, tokens, tokens):
        expected = sample(change(model), family)
    for patched in in_both_orders(model, tokens, change, strength=3.0):
        masks.clear()
        assert relative_error(sample(patched, family), expected) <= EXACT
        assert any(masks)


def test_an_override_that_drops_masks_of_some_sizes_only(models):
    """A kernel chosen by the number of keys: it is asked for each."""

    def override(func, q, k, v, heads, mask=None, **rest):
        return func(q, k, v, heads, mask=None if k.shape[-2] > 70 else mask, **rest)

    model, tokens = models["sd15"], tokens_for("sd15")
    expected = sample(apply_tokens(model, tokens, strength=0.3), "sd15")
    patched = apply_tokens(foreign.with_override(model, override), tokens, strength=0.3)
    assert relative_error(sample(patched, "sd15"), expected) <= EXACT


def test_an_override_that_is_more_than_a_kernel_and_drops_masks(models):
    """Nothing could take its place without changing the result."""
    model = foreign.with_override(
        models["sd3"], lambda func, q, k, v, heads, mask=None, **rest: func(q, k, 1.5 * v, heads, mask=None, **rest)
    )
    patched = apply_tokens(model, tokens_for("sd3"), strength=0.3)
    with pytest.raises(SoftREPAError, match="which changes the result and does not heed masks; expected strength 1"):
        sample(patched, "sd3")
    assert torch.isfinite(sample(apply_tokens(model, tokens_for("sd3")), "sd3")).all()


def test_an_override_that_counts_the_samples_is_refused_in_a_sentence(models):
    def override(func, q, k, v, heads, mask=None, **rest):
        if len(q) == 1:
            raise IndexError("no second sample")
        return func(q, k, v, heads, mask=None, **rest)

    patched = apply_tokens(foreign.with_override(models["sd15"], override), tokens_for("sd15"), strength=0.3)
    with pytest.raises(SoftREPAError, match="does not heed masks; expected strength 1 and apply_to both"):
        sample(patched, "sd15")


def test_cores_own_attention_computes_biases_in_full_precision():
    """A sage kernel of core's that takes no masks is told not to run."""
    told = []

    def core(q, k, v, heads, mask=None, low_precision_attention=True, **_):
        told.append((mask is not None, low_precision_attention))
        return q

    attention, x = SoftKeyBias(), torch.zeros(1, 6, 8)
    attention(core, x, x, x, 1)
    attention.expect(torch.zeros(1, 6))
    attention(core, x, x, x, 1)
    assert told == [(False, True), (True, False)]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("options", [{}, {"strength": 3.0}])
def test_keys_and_values_in_turn(models, family, options):
    """The text says what it says without NegPip, so the result is that of the plain model with tokens."""
    model, tokens = models[family], tokens_for(family)
    conds = {name: prompt(family, name) for name in ("positive", "negative")}
    expected = sample(apply_tokens(model, tokens, **options), family, **conds)
    turned = {name: foreign.in_turn(cond) for name, cond in conds.items()}
    for patched in in_both_orders(model, tokens, foreign.interleaved, **options):
        assert relative_error(sample(patched, family, **turned), expected) <= EXACT


@pytest.mark.parametrize("options", [{}, {"strength": 3.0}])
def test_contexts_repeated_for_regions(models, options):
    model, tokens = models["sd15"], tokens_for("sd15")
    expected = sample(apply_tokens(model, tokens, **options), "sd15")
    for patched in in_both_orders(model, tokens, foreign.regions, **options):
        assert relative_error(sample(patched, "sd15"), expected) <= EXACT


def test_whose_regions_they_are_must_be_known_where_it_matters(models):
    for patched in in_both_orders(models["sd15"], tokens_for("sd15"), foreign.regions, apply_to="positive"):
        with pytest.raises(SoftREPAError, match="makes 4 texts of 2 prompts, and which are negative cannot be told"):
            sample(patched, "sd15")


@pytest.mark.parametrize("apply_to", ["both", "positive", "negative"])
def test_every_region_gets_tokens_by_its_role(models, apply_to):
    """The oracle inserts into the region's text by hand; its time table is left out, for the text is made ahead."""
    model = models["sd15"]
    tokens = tokens_for("sd15", static=True)
    regional = seeded((1, LENGTH["sd15"], WIDTH["sd15"]), "regional", 1.0)

    def with_rows(text):
        return torch.cat([text[:, :1], tokens.tokens[None].to(text), text[:, 1:]], dim=1)

    blocks = {"blocks": "down,mid,up"}  # so that the oracle need not know where it is
    for patched in in_both_orders(
        model, tokens, lambda m: foreign.couple(m, regional), apply_to=apply_to, strength=1.0, **blocks
    ):
        ours = sample(patched, "sd15")
        conds = {name: prompt("sd15", name) for name in ("positive", "negative")}
        seen = {
            name: [[with_rows(cond[0][0]), {}]] if apply_to in ("both", name) else cond for name, cond in conds.items()
        }
        wide = with_rows(regional) if apply_to in ("both", "positive") else regional
        expected = sample(foreign.couple(model, wide), "sd15", **seen)
        assert relative_error(ours, expected) <= EXACT


@pytest.mark.parametrize("bank", ["positive", "negative"])
@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_a_negative_prompt_appended_to_the_context(models, weight, bank):
    model = models["sd15"]
    tokens = tokens_for("sd15", blocks=("down", "mid", "up"), static=True, banks=True)
    appended = seeded((1, LENGTH["sd15"], WIDTH["sd15"]), "nag", 1.0)
    with foreign.longer_context(model, appended, weight):
        ours = sample(apply_tokens(model, tokens, uncond_bank=bank), "sd15", cfg=1.0)
        plain = sample(model, "sd15", cfg=1.0)

    def with_rows(text, rows):
        return torch.cat([text[:, :1], rows[None], text[:, 1:]], dim=1)

    second = tokens.negative_tokens if bank == "negative" else tokens.tokens
    with foreign.longer_context(model, with_rows(appended, second), weight):
        positive = [[with_rows(prompt("sd15", "positive")[0][0], tokens.tokens), {}]]
        expected = sample(model, "sd15", cfg=1.0, positive=positive)
    assert relative_error(ours, expected) <= EXACT
    assert relative_error(ours, plain) > 1e-4


def test_attention_out_of_reach_cannot_be_weighed(models):
    appended = prompt("sd15", "nag")[0][0]
    for options in WEIGHED:
        patched = apply_tokens(models["sd15"], tokens_for("sd15"), **options)
        with (
            foreign.longer_context(models["sd15"], appended),
            pytest.raises(SoftREPAError, match=r"another node computes attention by itself \(input 1\)"),
        ):
            sample(patched, "sd15")
        with (
            foreign.longer_context(models["sd15"], appended, through_options=True),
            pytest.raises(SoftREPAError, match="only strength 0 or 1 works with it"),
        ):
            sample(patched, "sd15")
    appended = prompt("sd3", "nag")[0][0]
    patched = apply_tokens(models["sd3"], tokens_for("sd3"), strength=0.5)
    with (
        foreign.guided_joint_blocks(models["sd3"], appended, 0.5),
        pytest.raises(SoftREPAError, match=r"another node computes attention by itself \(block 0\)"),
    ):
        sample(patched, "sd3")


def test_a_negative_prompt_appended_to_joint_blocks(models):
    model, tokens = models["sd3"], tokens_for("sd3")
    appended = seeded((1, LENGTH["sd3"], WIDTH["sd3"]), "nag", 1.0)
    with foreign.guided_joint_blocks(model, appended, 0.6):
        ours = sample(apply_tokens(model, tokens), "sd3", cfg=1.0)
        plain = sample(model, "sd3", cfg=1.0)
        with injected(model, tokens):
            expected = sample(model, "sd3", cfg=1.0)
    assert relative_error(ours, expected) <= EXACT
    assert relative_error(ours, plain) > 1e-4


@pytest.mark.parametrize("options", [{}, {"apply_to": "positive"}])
def test_a_replacement_that_does_not_use_the_prompt(models, options):
    found = "does not use the prompt it is given" if not options else "another node replaces cross-attention"
    for patched in in_both_orders(models["sd15"], tokens_for("sd15"), foreign.own_context, **options):
        with pytest.raises(SoftREPAError, match=found):
            sample(patched, "sd15")
    elsewhere = apply_tokens(foreign.own_context(models["sd15"]), tokens_for("sd15"), blocks="up")
    assert torch.isfinite(sample(elsewhere, "sd15")).all()


OWN = {
    "only the values": lambda q, k, v, image: (image, v.mean(1, keepdim=True).expand_as(image) + image),
    "only the form of the prompt": lambda q, k, v, image: (image.to(k), image.expand_as(image).to(v)),
}


@pytest.mark.parametrize("name", OWN)
def test_a_replacement_that_uses_less_than_the_prompt(models, name):
    def replacement(q, k, v, extra):
        image = seeded((1, 5, q.shape[-1]), "own", 1.0).expand(len(q), -1, -1)
        return optimized_attention(q, *OWN[name](q, k, v, image), extra["n_heads"])

    model = models["sd15"].clone()
    model.set_model_attn2_replace(replacement, "input", 1)
    with pytest.raises(SoftREPAError, match="does not use the prompt it is given"):
        sample(apply_tokens(model, tokens_for("sd15")), "sd15")


def test_a_replacement_that_stops_using_the_prompt(models):
    calls = []

    def replacement(q, k, v, extra):
        calls.append(1)
        if len(calls) > 2:
            k = v = seeded((1, 5, q.shape[-1]), "own", 1.0).expand(len(q), -1, -1)
        return optimized_attention(q, k, v, extra["n_heads"])

    model = models["sd15"].clone()
    model.set_model_attn2_replace(replacement, "input", 1)
    with pytest.raises(SoftREPAError, match="does not use the prompt it is given"):
        sample(apply_tokens(model, tokens_for("sd15")), "sd15")
    assert len(calls) == 3
