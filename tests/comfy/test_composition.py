"""Soft tokens together with what else people put on a model: the result is that of the plain injection."""

import gc

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sd3 import SkipLayerGuidanceSD3
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.tokens import SoftTokens
from softrepa_tests import tiny_models
from softrepa_tests.composing import lora_for, one_by_one, same_when_compiled, small_controlnet
from softrepa_tests.oracle import injected
from softrepa_tests.sampling import Record, guider, noise, prompt, relative_error, sample, sigmas_of
from softrepa_tests.tiny_models import HIDDEN, LENGTH, seeded
from softrepa_tests.token_sets import tokens_for

EXACT = 1e-5


def check_both_orders(model, family, change, **options):
    """`change` before and after our node gives what it gives on the plainly injected model."""
    tokens = tokens_for(family)
    with injected(model, tokens):
        expected = sample(change(model), family, **options)
    assert relative_error(sample(apply_tokens(change(model), tokens), family, **options), expected) <= EXACT
    assert relative_error(sample(change(apply_tokens(model, tokens)), family, **options), expected) <= EXACT
    assert relative_error(sample(apply_tokens(model, tokens), family, **options), expected) > 1e-4


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_lora(models, family):
    model = models[family]
    lora = lora_for(model, family)
    check_both_orders(model, family, lambda m: comfy.sd.load_lora_for_models(m, None, lora, 1.0, 0.0)[0])


def test_controlnet(models):
    model, tokens = models["sd15"], tokens_for("sd15")
    control = small_controlnet()
    conds = {}
    for name in ("positive", "negative"):
        conds[name] = prompt("sd15", name)
        conds[name][0][1].update(control=control, control_apply_to_uncond=False)
    with injected(model, tokens):
        expected = sample(model, "sd15", **conds)
    assert relative_error(sample(apply_tokens(model, tokens), "sd15", **conds), expected) <= EXACT
    assert relative_error(sample(apply_tokens(model, tokens), "sd15"), expected) > 1e-4


def replace_attn2(model):
    """An attn2 replacement as IPAdapter makes it: the text's attention plus one over image keys of its own."""

    def replacement(q, k, v, extra_options):
        image = seeded((1, 5, q.shape[-1]), "ip", 1.0).expand(q.shape[0], -1, -1)
        heads = extra_options["n_heads"]
        return optimized_attention(q, k, v, heads) + 0.5 * optimized_attention(q, image, image, heads)

    model = model.clone()
    model.set_model_attn2_replace(replacement, "input", 1)
    return model


def test_attn2_replacement(models):
    check_both_orders(models["sd15"], "sd15", replace_attn2)


@pytest.mark.parametrize("options", [{"strength": 0.5}, {"apply_to": "positive"}])
def test_attn2_replacement_cannot_be_weighed(models, options):
    for patched in (
        apply_tokens(replace_attn2(models["sd15"]), tokens_for("sd15"), **options),
        replace_attn2(apply_tokens(models["sd15"], tokens_for("sd15"), **options)),
    ):
        with pytest.raises(SoftREPAError, match="another node replaces cross-attention"):
            sample(patched, "sd15")


def test_context_patches_of_others(models):
    """An attn2 patch of another pack keeps its effect, before or after ours; a value of its own too."""

    def with_patch(model, value_scale=1.0):
        model = model.clone()
        model.set_model_attn2_patch(lambda n, context, value, extra: (n * 1.1, context, value * value_scale))
        return model

    check_both_orders(models["sd15"], "sd15", with_patch)
    model, tokens = models["sd15"], tokens_for("sd15")
    with injected(model, tokens):
        both_scaled = sample(with_patch(model, 0.9), "sd15")
    before = sample(apply_tokens(with_patch(model, 0.9), tokens), "sd15")
    after = sample(with_patch(apply_tokens(model, tokens), 0.9), "sd15")
    assert torch.equal(before, after)
    # it scales the text's values and not the soft ones
    assert relative_error(after, both_scaled) > 1e-4


def test_a_lengthened_context_in_either_order(models):
    def lengthen(model):
        model = model.clone()
        model.set_model_attn2_patch(
            lambda n, context, value, extra: (n, *(torch.cat([one, one[:, :3]], 1) for one in (context, value)))
        )
        return model

    model, tokens = models["sd15"], tokens_for("sd15")
    before = sample(apply_tokens(lengthen(model), tokens, strength=0.5), "sd15")
    after = sample(lengthen(apply_tokens(model, tokens, strength=0.5)), "sd15")
    assert torch.equal(before, after)
    assert relative_error(after, sample(lengthen(model), "sd15")) > 1e-4


def test_perturbed_attention_guidance(models):
    for family in ("sd15", "sdxl"):
        check_both_orders(models[family], family, lambda m: PerturbedAttentionGuidance.execute(m, 2.0)[0])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_cores_normalized_attention_guidance(models, family):
    check_both_orders(models[family], family, lambda m: NAGuidance.execute(m, 3.0, 0.5, 2.5)[0])


def test_skip_layer_guidance(models):
    def skip(model):
        return SkipLayerGuidanceSD3.execute(model, "1, 5", 2.0, 0.0, 1.0)[0]

    model, tokens = models["sd3"], tokens_for("sd3")
    with injected(model, tokens):
        expected = sample(skip(model), "sd3")
    for patched in (skip(apply_tokens(model, tokens)), apply_tokens(skip(model), tokens)):
        assert relative_error(sample(patched, "sd3"), expected) <= EXACT
    with injected(model, tokens, tokens, tokens):
        thrice = sample(skip(model), "sd3")
    assert relative_error(sample(apply_tokens(skip(model), tokens, strength=3.0), "sd3"), thrice) <= EXACT


def test_a_skipped_block_below_ours_leaves_no_weight_behind(models):
    """Block 1 computes no attention; block 2's must not get the bias meant for it."""
    model, tokens = models["sd3"].clone(), tokens_for("sd3")
    model.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    with injected(model, tokens, tokens, tokens):
        thrice = sample(model, "sd3")
    assert relative_error(sample(apply_tokens(model, tokens, strength=3.0), "sd3"), thrice) <= EXACT
    narrow = apply_tokens(model, tokens, strength=0.5, blocks="2")
    assert torch.isfinite(sample(narrow, "sd3")).all()


def test_another_double_block_replacement_in_either_order(models):
    seen = []

    def other(args, extra):
        seen.append(args["txt"].shape[1])
        out = extra["original_block"](args)
        return out | {"img": out["img"] * 1.01}

    model, tokens = models["sd3"].clone(), tokens_for("sd3")
    model.set_model_patch_replace(other, "dit", "double_block", 1)
    with injected(model, tokens):
        expected = sample(model, "sd3")
    seen.clear()
    twice = apply_tokens(apply_tokens(model, tokens), tokens_for("sd3", "b"))
    assert relative_error(sample(apply_tokens(model, tokens), "sd3"), expected) <= EXACT
    assert set(seen) == {LENGTH["sd3"] + 4}
    seen.clear()
    sample(twice, "sd3")
    assert set(seen) == {LENGTH["sd3"] + 8}
    later = apply_tokens(models["sd3"], tokens)
    later.set_model_patch_replace(other, "dit", "double_block", 1)
    assert relative_error(sample(later, "sd3"), expected) <= EXACT


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_area_and_mask(models, family, strength):
    """Regions run alone or in a batch of their own shape; strengths between compare the two batchings."""
    model, tokens = models[family], tokens_for(family)
    positive = prompt(family, "positive")
    area, masked = prompt(family, "area"), prompt(family, "masked")
    area[0][1].update(area=(4, 8, 4, 0), strength=0.9, set_area_to_bounds=False)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    masked[0][1].update(mask=mask, set_area_to_bounds=False, mask_strength=0.7)
    conds = {"positive": positive + area + masked}
    ours = sample(apply_tokens(model, tokens, strength=strength), family, **conds)
    if strength == 1:
        with injected(model, tokens):
            expected = sample(model, family, **conds)
    else:
        patched = apply_tokens(model, tokens, strength=strength)
        patched.model_options["model_function_wrapper"] = one_by_one
        expected = sample(patched, family, **conds)
    assert relative_error(ours, expected) <= EXACT


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_conditioning_hooks_with_a_schedule(models, family):
    model, tokens = models[family], tokens_for(family)

    def conds():
        hooks = comfy.hooks.create_hook_lora(lora_for(model, family), 1.0, 0.0)
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.5))
        hooks.set_keyframes_on_hooks(frames)
        return {"positive": comfy.hooks.set_hooks_for_conditioning(prompt(family, "positive"), hooks)}

    with injected(model, tokens):
        expected = sample(model.clone(), family, **conds())
    assert relative_error(sample(apply_tokens(model, tokens), family, **conds()), expected) <= EXACT
    assert relative_error(sample(apply_tokens(model, tokens), family), expected) > 1e-4


def test_torch_compile(models, family="sd3"):
    """As ComfyUI's compile node does it: the same result, and no recompilation after step 2. More is in tests/long."""
    options = {"strength": 0.5, "start_percent": 0.3, "end_percent": 0.7, "apply_to": "positive"}
    same_when_compiled(apply_tokens(models[family], tokens_for(family), **options), family, steps=10, tolerance=EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_weights_in_other_dtypes(family, dtype):
    model = tiny_models.build(family)
    tiny_models.store_in(model, dtype)
    ours = sample(apply_tokens(model, tokens_for(family)), family, steps=2)
    with injected(model, tokens_for(family)):
        expected = sample(model, family, steps=2)
    assert torch.isfinite(ours).all()
    assert relative_error(ours, expected) <= EXACT


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_half_precision_compute(family, strength):
    model = tiny_models.build(family)
    full = sample(apply_tokens(model, tokens_for(family), strength=strength), family, steps=1)
    model.model.diffusion_model.to(torch.bfloat16)
    model.model.diffusion_model.dtype = torch.bfloat16
    half = sample(apply_tokens(model, tokens_for(family), strength=strength), family, steps=1)
    assert torch.isfinite(half).all()
    assert relative_error(half, full) < 0.1


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_partial_loading_that_offloads(family, monkeypatch):
    model = tiny_models.build(family)
    expected = sample(apply_tokens(model, tokens_for(family)), family)
    patched = apply_tokens(model, tokens_for(family))
    # sampling would load the rest again
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: None)
    patched.partially_load(torch.device("cpu"), patched.model_size() // 3)
    patched.partially_unload(torch.device("cpu"), patched.model_size() * 2 // 3)
    network, offloaded = model.model.diffusion_model, []

    def count(*_):
        modules = network.modules()
        offloaded.append(sum(getattr(m, "prev_comfy_cast_weights", None) is not None for m in modules))

    network.register_forward_hook(count)
    ours = sample(patched, family)
    assert min(offloaded) > 10
    assert relative_error(ours, expected) <= EXACT


@pytest.mark.parametrize("version", ["medium", "large"])
def test_sd35(version):
    """SD3.5: query-key norms, and in -medium an image-only attention beside the joint one; not the width of -large."""
    more = {"qk_norm": "rms"} | ({"x_block_self_attn_layers": [0, 1]} if version == "medium" else {})
    width, layers = HIDDEN["sd3"], 4
    model = tiny_models.mmdit_of(width, layers + 1, **more)
    tokens = SoftTokens.of(
        seeded((layers, 4, width), "35/tokens", 1.0),
        "sd3",
        layers,
        time_table=seeded((100, layers * width), "35/table", 1.0),
    )
    with injected(model, tokens):
        expected = sample(model, "sd3", steps=2)
    assert relative_error(sample(apply_tokens(model, tokens), "sd3", steps=2), expected) <= EXACT
    with injected(model, tokens, tokens, tokens):
        thrice = sample(model, "sd3", steps=2)
    assert relative_error(sample(apply_tokens(model, tokens, strength=3.0), "sd3", steps=2), thrice) <= EXACT
    assert relative_error(sample(model, "sd3", steps=2), expected) > EXACT


def test_text_width_tokens_with_a_time_table(models):
    """4096-wide rows go through the context embedder first; the table, of hidden width, is added after it."""
    table = seeded((100, 3 * HIDDEN["sd3"]), "wide/table", 0.5)
    tokens = SoftTokens.of(seeded((3, 2, 4096), "wide/tokens", 0.5), "sd3", 3, time_table=table)
    with injected(models["sd3"], tokens):
        expected = sample(models["sd3"], "sd3")
    assert relative_error(sample(apply_tokens(models["sd3"], tokens), "sd3"), expected) <= EXACT


def test_reference_text_length(models):
    """77 + 512 text tokens, as the reference runs SD3."""
    tokens = tokens_for("sd3")
    conds = {name: prompt("sd3", name, length=589) for name in ("positive", "negative")}
    with injected(models["sd3"], tokens):
        expected = sample(models["sd3"], "sd3", **conds)
    assert relative_error(sample(apply_tokens(models["sd3"], tokens), "sd3", **conds), expected) <= EXACT


def test_no_growth_over_two_hundred_prompts(models):
    """Patched models are dropped with their graph."""
    counts = []
    for number in range(200):
        patched = apply_tokens(models["sd15"], tokens_for("sd15"), strength=0.5)
        guider(patched, "sd15").sample(
            noise("sd15"), noise("sd15"), Record(), sigmas_of(patched, 1), disable_pbar=True, seed=0
        )
        del patched
        if number % 50 == 49:
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert max(counts) - min(counts) < 500, counts
