"""Soft tokens on a MODEL under ComfyUI's real samplers: strength, window, roles, blocks, several sets, batching."""

import contextlib
import gc
import weakref

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg, PerpNeg
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfyui_softrepa.softrepa.comfy.tokens.attention import combined
from comfyui_softrepa.softrepa.comfy.tokens.patching import KEY, apply_tokens, in_window
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.tokens import SoftTokens
from softrepa_tests.oracle import injected
from softrepa_tests.sampling import guider, noise, prompt, record, relative_error, sample, sigmas_of
from softrepa_tests.tiny_models import HIDDEN, LENGTH
from softrepa_tests.token_sets import tokens_for

FAMILIES = ("sd15", "sdxl", "sd3")
EXACT = 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_one_equals_plain_injection(models, family):
    tokens = tokens_for(family)
    ours = sample(apply_tokens(models[family], tokens), family)
    with injected(models[family], tokens):
        expected = sample(models[family], family)
    assert relative_error(ours, expected) <= EXACT
    assert relative_error(sample(models[family], family), expected) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_zero_is_the_unpatched_model(models, family):
    patched = apply_tokens(models[family], tokens_for(family), strength=0.0)
    assert patched.model_options == models[family].model_options
    assert torch.equal(sample(patched, family), sample(models[family], family))


class AttentionSpy:
    """Records the softmax mass on the soft keys of every attention that has them."""

    def __init__(self, soft_keys):
        self.soft_keys, self.mass = soft_keys, []

    def __deepcopy__(self, memo):
        return self  # ComfyUI 0.3.75 deep-copies model options

    def __call__(self, func, q, k, v, heads, mask=None, **kwargs):
        columns = self.soft_keys(k.shape[1], q.shape[1])
        is_asked = mask is not None and mask.isinf().any()  # whether it heeds masks; no weight here is infinite
        if columns is not None and not is_asked:
            split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k)]
            logits = split[0] @ split[1].transpose(-1, -2) * split[0].shape[-1] ** -0.5
            if mask is not None:
                logits = logits + mask.unsqueeze(1)
            self.mass.append(logits.softmax(-1)[..., columns].sum(-1).mean().item())
        return func(q, k, v, heads, mask=mask, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mass_rises_with_strength(models, family):
    if family == "sd3":
        image = 16
        columns = lambda keys, queries: [0, 1, 2, 3] if keys == 4 + LENGTH["sd3"] + image else None  # noqa: E731
    else:
        columns = lambda keys, queries: [1, 2, 3, 4] if keys == 81 else None  # noqa: E731
    plain = sample(models[family], family)
    mass, distance = [], []
    for strength in (0.001, 0.1, 0.5, 1.0, 2.0):
        spied = models[family].clone()
        spy = AttentionSpy(columns)
        spied.model_options["transformer_options"]["optimized_attention_override"] = spy
        out = sample(apply_tokens(spied, tokens_for(family), strength=strength), family)
        mass.append(sum(spy.mass) / len(spy.mass))
        distance.append(relative_error(out, plain))
    assert mass == sorted(mass)
    assert mass[0] < 0.01 < mass[-1]
    assert distance[0] < 0.02 * distance[3]
    assert distance[0] < distance[1] < distance[2] < distance[3]


@pytest.mark.parametrize("family", FAMILIES)
def test_small_strength_tends_to_the_plain_model(models, family):
    plain = sample(models[family], family)
    errors = [
        relative_error(sample(apply_tokens(models[family], tokens_for(family), strength=s), family), plain)
        for s in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheduler", ["normal", "simple"])
@pytest.mark.parametrize("window", [(0.3, 0.7), (0.0, 0.4), (0.25, 0.55)])
def test_window_acts_on_exactly_its_steps(models, family, scheduler, window):
    """On the steps on which ComfyUI would use a cond with the same start and end."""
    model = models[family]
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, 20)
    start, end = window
    cond = {"start_percent": start, "end_percent": end}
    comfy.samplers.calculate_start_end_timesteps(model.model, conds := [cond])
    patched = apply_tokens(model, tokens_for(family), start_percent=start, end_percent=end)
    (token_set,) = patched.get_attachment(KEY).sets
    inside = []
    for sigma in sigmas[:-1]:
        closed = "timestep_start" in conds[0] and sigma > conds[0]["timestep_start"]
        inside.append(not (closed or sigma < conds[0]["timestep_end"]))
        assert in_window(token_set, sampling, sigma[None]) == inside[-1], sigma
    assert 0 < sum(inside) < len(inside)


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_the_window_the_model_is_plain(models, family):
    model, x = models[family], noise(family)
    sigmas = sigmas_of(model, 6)
    patched = apply_tokens(model, tokens_for(family), start_percent=0.3, end_percent=0.7)
    plain = record(guider(model, family), x, sigmas)
    full = record(guider(apply_tokens(model, tokens_for(family)), family), x, sigmas)
    windowed = record(guider(patched, family), x, sigmas)
    is_plain = [torch.equal(ours, expected) for ours, expected in zip(windowed, plain, strict=True)]
    is_full = [torch.equal(ours, expected) for ours, expected in zip(windowed, full, strict=True)]
    assert [not one for one in is_plain] == is_full
    assert 0 < sum(is_full) < len(is_full)


def predictions(model, family, tokens, negative_tokens=None):
    """Denoised predictions of the positive and the negative prompt, each alone, with the plain injection."""
    out = []
    for name, active in (("positive", tokens), ("negative", negative_tokens)):
        alone = guider(model, family, cfg=1.0, positive=prompt(family, name))
        sigmas = sigmas_of(model, 2)
        if active is None:
            out.append(record(alone, noise(family), sigmas)[0])
        else:
            with injected(model, active):
                out.append(record(alone, noise(family), sigmas)[0])
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("apply_to", ["both", "positive", "negative"])
def test_apply_to_under_cfg(models, family, apply_to):
    tokens = tokens_for(family)
    patched = apply_tokens(models[family], tokens, apply_to=apply_to)
    ours = record(guider(patched, family, cfg=3.0), noise(family), sigmas_of(patched, 2))[0]
    positive, negative = predictions(
        models[family], family, *(tokens if apply_to in ("both", role) else None for role in ("positive", "negative"))
    )
    assert relative_error(ours, negative + 3.0 * (positive - negative)) <= EXACT


def test_negative_bank_acts_on_the_unconditional_half(models):
    for family in FAMILIES:
        tokens = tokens_for(family, banks=True)
        other = SoftTokens(tokens.negative_tokens, tokens.family, tokens.blocks, time_table=tokens.time_table)
        patched = apply_tokens(models[family], tokens, uncond_bank="negative")
        ours = record(guider(patched, family, cfg=3.0), noise(family), sigmas_of(patched, 2))[0]
        positive, negative = predictions(models[family], family, tokens, other)
        assert relative_error(ours, negative + 3.0 * (positive - negative)) <= EXACT


class RoleSpy:
    """Which prompts an attention sees soft keys for: by call, a flag per cond of the batch."""

    def __init__(self, model, patch_key=KEY):
        self.calls = []
        patch = model.get_attachment(patch_key)
        state = patch.state

        def spied(base_model, sigma, negative, is_fixed=False):
            result = state(base_model, sigma, negative, is_fixed)
            weights = [
                bool(result.rows) and (not result.bias or next(iter(result.bias.values()))[i].max().item() > -1)
                for i in range(len(negative))
            ]
            self.calls.append(weights)
            return result

        patch.state = spied


@pytest.mark.parametrize("apply_to", ["positive", "negative"])
def test_roles_under_other_guiders(models, apply_to):
    """By the cond's name in the guider, whatever its position in the batch."""
    family = "sd15"
    is_positive = apply_to == "positive"

    def run(make):
        patched = apply_tokens(models[family], tokens_for(family), apply_to=apply_to)
        guided = make(patched)
        spy = RoleSpy(patched)
        record(guided, noise(family), sigmas_of(patched, 1))
        return spy.calls

    def dual(model):
        guided = Guider_DualCFG(model)
        guided.set_conds(prompt(family, "positive"), prompt(family, "middle"), prompt(family, "negative"))
        guided.set_cfg(3.0, 2.0)
        return guided

    def perp(model):
        guided = Guider_PerpNeg(model)
        guided.set_conds(prompt(family, "positive"), prompt(family, "negative"), prompt(family, "empty"))
        guided.set_cfg(3.0, 1.0)
        return guided

    # ComfyUI batches the last cond first: Dual [positive, middle, negative], Perp-Neg [empty, negative, positive]
    assert run(dual) == [[is_positive, is_positive, not is_positive]]
    assert run(perp) == [[not is_positive, not is_positive, is_positive]]
    # SAG runs the unconditional prompt again, alone, at position 0
    sag = run(lambda model: guider(SelfAttentionGuidance.execute(model, 0.5, 2.0)[0], family))
    assert sag == [[not is_positive, is_positive], [not is_positive]]


def test_roles_survive_area_copies(models):
    """ComfyUI copies a cond, uuid and all, into the other role for its area; the copy has the other role."""
    family = "sd15"

    def cornered(name):
        area = prompt(family, name)
        area[0][1].update(area=(4, 4, 0, 0), strength=1.0, set_area_to_bounds=False)
        return area

    positive = prompt(family, "positive") + cornered("corner")
    patched = apply_tokens(models[family], tokens_for(family), apply_to="positive")
    ours = record(guider(patched, family, cfg=3.0, positive=positive), noise(family), sigmas_of(patched, 2))[0]
    plain = guider(models[family], family, cfg=1.0, positive=prompt(family, "negative") + cornered("negative"))
    uncond = record(plain, noise(family), sigmas_of(patched, 2))[0]
    with injected(models[family], tokens_for(family)):
        alone = guider(models[family], family, cfg=1.0, positive=positive)
        cond = record(alone, noise(family), sigmas_of(patched, 2))[0]
    assert relative_error(ours, uncond + 3.0 * (cond - uncond)) <= EXACT


def test_narrower_blocks(models):
    tokens = tokens_for("sd3")
    fewer = SoftTokens(tokens.tokens[:2], tokens.family, 2, time_table=tokens.time_table[:, : 2 * HIDDEN["sd3"]])
    with injected(models["sd3"], fewer):
        expected = sample(models["sd3"], "sd3")
    assert relative_error(sample(apply_tokens(models["sd3"], tokens, blocks="2"), "sd3"), expected) <= EXACT
    for blocks in (("down",), ("up",), ("down", "mid", "up")):
        with injected(models["sd15"], tokens_for("sd15", blocks=blocks)):
            expected = sample(models["sd15"], "sd15")
        ours = sample(apply_tokens(models["sd15"], tokens_for("sd15"), blocks=",".join(blocks)), "sd15")
        assert relative_error(ours, expected) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_two_nodes_in_a_row_insert_together(models, family):
    first, second = tokens_for(family, "a"), tokens_for(family, "b", blocks=2 if family == "sd3" else ("down",))
    patched = apply_tokens(apply_tokens(models[family], first), second)
    with injected(models[family], first, second):
        expected = sample(models[family], family)
    assert relative_error(sample(patched, family), expected) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_three_is_three_copies(models, family):
    """Weight 3 in the softmax is what three equal keys have."""
    tokens = tokens_for(family)
    with injected(models[family], tokens, tokens, tokens):
        expected = sample(models[family], family)
    assert relative_error(sample(apply_tokens(models[family], tokens, strength=3.0), family), expected) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_sets_with_options_of_their_own(models, family):
    """Two nodes with other strengths, roles and windows: each acts as it would by the plain injection."""
    first, second = tokens_for(family, "a"), tokens_for(family, "b")
    model = apply_tokens(models[family], first, strength=3.0, apply_to="positive", end_percent=0.5)
    model = apply_tokens(model, second, apply_to="negative", start_percent=0.5)
    sigmas = sigmas_of(model, 4)
    middle = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    ours = record(guider(model, family, cfg=3.0), noise(family), sigmas)

    def halves(active):
        out = []
        for name, sets in (("positive", active[0]), ("negative", active[1])):
            alone = guider(models[family], family, cfg=1.0, positive=prompt(family, name))
            with injected(models[family], *sets) if sets else contextlib.nullcontext():
                out.append(record(alone, noise(family), sigmas))
        return out

    early = halves(([first] * 3, []))
    late = halves(([], [second]))
    for step, sigma in enumerate(sigmas[:-1]):
        positive, negative = ((early if sigma > middle else late)[half][step] for half in (0, 1))
        assert relative_error(ours[step], negative + 3.0 * (positive - negative)) <= EXACT, step


def test_a_foreign_patch_between_two_nodes_sees_the_text_alone(models):
    lengths = []

    def foreign(n, context, value, extra):
        lengths.append(context.shape[1])
        return n, context, value

    model = apply_tokens(models["sd15"], tokens_for("sd15", "a"))
    model.set_model_attn2_patch(foreign)
    model = apply_tokens(model, tokens_for("sd15", "b"))
    sample(model, "sd15", steps=1)
    assert set(lengths) == {77}
    wrappers = model.model_options["transformer_options"]["wrappers"]
    assert {kind: len(by_key[KEY]) for kind, by_key in wrappers.items()} == {"outer_sample": 1, "apply_model": 1}


def test_masks_that_are_there_already():
    bias = torch.tensor([[[0.0, -1.0, 2.0]]])
    keep = torch.tensor([[True, False, True]])
    assert combined(bias, None) is bias
    for mask in (keep, keep.unsqueeze(0), keep.view(1, 1, 1, 3)):
        for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
            assert combined(bias, form).flatten().tolist() == [0.0, float("-inf"), 2.0]


def test_legacy_perp_neg_is_unconditional(models):
    """Its own empty prompt is no cond of the guider: it counts as a negative."""
    family = "sd15"
    patched = apply_tokens(models[family], tokens_for(family), apply_to="positive")
    (guided_model,) = PerpNeg.execute(patched, prompt(family, "empty"), 1.0).args
    spy = RoleSpy(guided_model)
    record(guider(guided_model, family), noise(family), sigmas_of(patched, 1))
    assert spy.calls == [[False, True], [False]]


def test_uneven_batches_are_refused_where_roles_matter(models):
    def splitter(apply_model, args):
        c = {key: value[:1] if torch.is_tensor(value) else value for key, value in args["c"].items()}
        return apply_model(args["input"][:1], args["timestep"][:1], **c).repeat(2, 1, 1, 1)

    for apply_to in ("both", "positive"):
        patched = apply_tokens(models["sd15"], tokens_for("sd15"), apply_to=apply_to)
        patched.model_options["model_function_wrapper"] = splitter
        if apply_to == "both":
            sample(patched, "sd15", steps=1)
        else:
            with pytest.raises(SoftREPAError, match="1 samples for 2 prompts, expected as many for each"):
                sample(patched, "sd15", steps=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_clones_do_not_see_each_other(models, family):
    one = apply_tokens(models[family], tokens_for(family, "a"))
    two = apply_tokens(models[family], tokens_for(family, "b"))
    base_before = sample(models[family], family)
    first = sample(one, family)
    second = sample(two, family)
    assert torch.equal(sample(one, family), first)
    assert torch.equal(sample(two, family), second)
    assert torch.equal(sample(models[family], family), base_before)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("length", [77, 154, 231])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_long_prompts_batched_and_one_by_one(models, family, length, strength, monkeypatch):
    """A negative of 77 is repeated to the positive's length when batched; the result stays."""
    patched = apply_tokens(models[family], tokens_for(family), strength=strength)
    conds = {"positive": prompt(family, "positive", length=length), "negative": prompt(family, "negative")}
    calls = count_network_calls(patched)
    batched = sample(patched, family, steps=2, **conds)
    assert calls() == 2
    monkeypatch.setattr(patched.model, "memory_required", lambda *args, **kwargs: 1e30)
    single = sample(patched, family, steps=2, **conds)
    assert calls() == 4
    assert relative_error(single, batched) <= EXACT


def count_network_calls(model):
    """A function that returns the calls of the network since it was last asked."""
    seen = []
    model.model.diffusion_model.register_forward_hook(lambda *_: seen.append(1))

    def calls():
        count = len(seen)
        seen.clear()
        return count

    return calls


def test_context_of_another_length_gets_one_insertion(models):
    for length in (50, 100):
        positive, negative = (prompt("sd15", name, length=length) for name in ("positive", "negative"))
        patched = apply_tokens(models["sd15"], tokens_for("sd15"))
        with injected(models["sd15"], tokens_for("sd15")):
            expected = sample(models["sd15"], "sd15", positive=positive, negative=negative)
        ours = sample(patched, "sd15", positive=positive, negative=negative)
        assert relative_error(ours, expected) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_batch_sizes_and_odd_sizes(models, family, batch):
    tokens = tokens_for(family)
    x = noise(family, batch=batch, size=(9, 14) if family == "sd3" else (10, 14))
    ours = sample(apply_tokens(models[family], tokens), family, steps=2, x=x)
    with injected(models[family], tokens):
        expected = sample(models[family], family, steps=2, x=x)
    assert relative_error(ours, expected) <= EXACT


def test_timesteps_are_those_of_each_sample(models):
    """One call with different sigmas in the batch uses each sample's own row of the time table."""
    for family in FAMILIES:
        model, tokens = models[family], tokens_for(family)
        patched = apply_tokens(model, tokens)
        sigmas = sigmas_of(model, 3)[:2]
        x = noise(family, batch=2)
        context = prompt(family, "positive", batch=2)[0][0]
        extra = {} if family == "sd15" else {"y": torch.zeros(2, 2816 if family == "sdxl" else 2048)}

        def call(owner, x=x, sigmas=sigmas, context=context, extra=extra):
            options = owner.model_options["transformer_options"]
            return owner.model.apply_model(x, sigmas, c_crossattn=context, transformer_options=options, **extra)

        together = call(patched)
        with injected(model, tokens):
            expected = call(model)
        assert relative_error(together, expected) <= EXACT


def test_freed_with_the_model_clone(models):
    gone = []
    for family in FAMILIES:
        patched = apply_tokens(models[family], tokens_for(family))
        sample(patched, family, steps=1)
        gone.append(weakref.ref(patched.get_attachment(KEY)))
        del patched
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(FAMILIES)
