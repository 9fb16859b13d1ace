"""Soft tokens on transformers with rotary positions, each on a tiny network of its own architecture."""

import contextlib

import pytest
import torch
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.families import FAMILIES
from comfyui_softrepa.softrepa.tokens import SoftTokens
from softrepa_tests import tiny_models
from softrepa_tests.of_families import EACH_KIND, EVERY_TRANSFORMER
from softrepa_tests.oracle import blocks_of, injected
from softrepa_tests.sampling import guider, noise, prompt, record, relative_error, sample, sigmas_of
from softrepa_tests.tiny_models import HIDDEN, seeded
from softrepa_tests.token_sets import tokens_for

EXACT = 1e-5


def all_blocks(model, family: str, seed: str = "all") -> SoftTokens:
    """Tokens in every block, of both kinds where there are two."""
    layers, width = len(blocks_of(model.model.diffusion_model)), HIDDEN[family]
    return SoftTokens.of(
        seeded((layers, 4, width), f"{seed}/tokens", 0.5),
        family,
        layers,
        time_table=seeded((100, layers * width), f"{seed}/table", 0.5),
    )


@EVERY_TRANSFORMER
def test_strength_one_equals_rows_in_the_stream(models, family):
    tokens = all_blocks(models[family], family)
    ours = sample(apply_tokens(models[family], tokens), family)
    with injected(models[family], tokens):
        expected = sample(models[family], family)
    assert relative_error(ours, expected) <= EXACT
    assert relative_error(sample(models[family], family), expected) > 1e-3


@EVERY_TRANSFORMER
def test_strength_zero_is_the_unpatched_model(models, family):
    patched = apply_tokens(models[family], tokens_for(family), strength=0.0)
    assert patched.model_options == models[family].model_options
    assert torch.equal(sample(patched, family), sample(models[family], family))


@EACH_KIND
def test_strength_three_is_three_copies(models, family):
    tokens = all_blocks(models[family], family)
    with injected(models[family], tokens, tokens, tokens):
        expected = sample(models[family], family)
    assert relative_error(sample(apply_tokens(models[family], tokens, strength=3.0), family), expected) <= EXACT


@EACH_KIND
def test_small_strength_tends_to_the_plain_model(models, family):
    plain = sample(models[family], family)
    tokens = all_blocks(models[family], family)
    errors = [
        relative_error(sample(apply_tokens(models[family], tokens, strength=s), family), plain)
        for s in (0.5, 1e-3, 1e-6)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


@EVERY_TRANSFORMER
def test_each_step_reads_its_own_row_of_the_table(models, family):
    """Rows of a time table that are the same but for one: only the step in its bucket tells them apart."""
    tokens, x = tokens_for(family), noise(family)
    sigmas = torch.tensor([0.95, 0.55, 0.25, 0.0])
    one = tokens.time_table.clone()
    one[55] += 3.0
    other = SoftTokens(tokens.tokens, tokens.family, tokens.blocks, time_table=one)
    ours, expected = (record(guider(apply_tokens(models[family], t), family), x, sigmas) for t in (other, tokens))
    assert [torch.equal(a, b) for a, b in zip(ours, expected, strict=True)] == [True, False, True]


@EACH_KIND
def test_outside_the_window_the_model_is_plain(models, family):
    model, x = models[family], noise(family)
    sigmas = sigmas_of(model, 6)
    plain = record(guider(model, family), x, sigmas)
    full = record(guider(apply_tokens(model, tokens_for(family)), family), x, sigmas)
    patched = apply_tokens(model, tokens_for(family), start_percent=0.3, end_percent=0.7)
    windowed = record(guider(patched, family), x, sigmas)
    is_plain = [torch.equal(ours, expected) for ours, expected in zip(windowed, plain, strict=True)]
    is_full = [torch.equal(ours, expected) for ours, expected in zip(windowed, full, strict=True)]
    assert [not one for one in is_plain] == is_full
    assert 0 < sum(is_full) < len(is_full)


def alone(model, family: str, name: str, active, x, sigmas):
    """What one prompt predicts, with the plain injection of `active`."""
    with injected(model, *active) if active else contextlib.nullcontext():
        return record(guider(model, family, cfg=1.0, positive=prompt(family, name)), x, sigmas)[0]


@EACH_KIND
@pytest.mark.parametrize("apply_to", ["both", "positive", "negative"])
def test_roles_under_cfg(models, family, apply_to):
    tokens, x = tokens_for(family), noise(family)
    patched = apply_tokens(models[family], tokens, apply_to=apply_to)
    sigmas = sigmas_of(patched, 2)
    ours = record(guider(patched, family, cfg=3.0), x, sigmas)[0]
    positive, negative = (
        alone(models[family], family, role, [tokens] if apply_to in ("both", role) else [], x, sigmas)
        for role in ("positive", "negative")
    )
    assert relative_error(ours, negative + 3.0 * (positive - negative)) <= EXACT


@EACH_KIND
def test_the_negative_bank(models, family):
    tokens, x = tokens_for(family, banks=True), noise(family)
    other = SoftTokens(tokens.negative_tokens, tokens.family, tokens.blocks, time_table=tokens.time_table)
    patched = apply_tokens(models[family], tokens, uncond_bank="negative")
    sigmas = sigmas_of(patched, 2)
    ours = record(guider(patched, family, cfg=3.0), x, sigmas)[0]
    positive, negative = (
        alone(models[family], family, role, [active], x, sigmas)
        for role, active in (("positive", tokens), ("negative", other))
    )
    assert relative_error(ours, negative + 3.0 * (positive - negative)) <= EXACT


@EACH_KIND
def test_two_nodes_in_a_row_insert_together(models, family):
    first, second = all_blocks(models[family], family), tokens_for(family, "b", blocks=2)
    patched = apply_tokens(apply_tokens(models[family], first), second)
    with injected(models[family], first, second):
        expected = sample(models[family], family)
    assert relative_error(sample(patched, family), expected) <= EXACT


@EACH_KIND
def test_without_guidance_there_is_no_negative(models, family):
    """As models that are distilled for it run."""
    tokens = tokens_for(family)
    with injected(models[family], tokens):
        expected = sample(models[family], family, cfg=1.0)
    assert relative_error(sample(apply_tokens(models[family], tokens), family, cfg=1.0), expected) <= EXACT


@EACH_KIND
def test_a_batch_of_pictures(models, family):
    tokens, x = tokens_for(family), noise(family, batch=3)
    with injected(models[family], tokens):
        expected = sample(models[family], family, x=x)
    assert relative_error(sample(apply_tokens(models[family], tokens), family, x=x), expected) <= EXACT


@EACH_KIND
def test_the_network_called_without_its_wrappers_is_refused(models, family):
    patched = apply_tokens(models[family], tokens_for(family))
    options = patched.model_options["transformer_options"]
    context = prompt(family, "positive")[0][0]
    with pytest.raises(SoftREPAError, match="called without its wrappers"):
        patched.model.diffusion_model(
            noise(family),
            torch.ones(1),
            context,
            num_tokens=9,
            guidance=torch.ones(1),
            transformer_options=dict(options),
        )


@EACH_KIND
def test_nothing_stays_in_the_callers_options(models, family):
    """A network that writes its place into the options it is given must not meet it again in the next call."""
    patched = apply_tokens(models[family], tokens_for(family))
    sample(patched, family, steps=1)
    options = patched.model_options["transformer_options"]
    assert not {"block_index", "block_type", "optimized_attention_override", "softrepa"} & set(options)


@EACH_KIND
def test_a_network_that_is_called_twice_in_a_call(models, family):
    """By another node's wrapper, with the same options: what ran last must not be taken for what runs first."""
    tokens = all_blocks(models[family], family)
    patched = apply_tokens(models[family], tokens)
    expected = sample(patched, family, steps=1)
    twice = patched.clone()

    def again(executor, *args, **kwargs):
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    twice.add_wrapper("diffusion_model", again)
    assert torch.equal(sample(twice, family, steps=1), expected)


@EACH_KIND
def test_another_nodes_kernel_sees_the_rows(models, family):
    keys = []

    def kernel(func, q, k, v, *args, **kwargs):
        keys.append(k.shape[-2])
        return func(q, k, v, *args, **kwargs)

    model = models[family].clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = kernel
    tokens = all_blocks(models[family], family)
    sample(model, family, steps=1)
    plain, keys[:] = list(keys), []
    ours = sample(apply_tokens(model, tokens), family, steps=1)
    assert torch.equal(ours, sample(apply_tokens(models[family], tokens), family, steps=1))
    assert sum(keys[: len(plain)]) - sum(plain) == 4 * tokens.layers


@pytest.mark.parametrize(
    ("like", "kind", "change"),
    [
        ("anima", "CosmosT2IPredict2", {"image_model": "cosmos_predict2"}),
        ("hunyuanimage", "HunyuanImage21", {"patch_size": [1, 1, 1], "axes_dim": [16, 24, 24]}),
        ("lumina2", "Lumina2", {"clip_text_dim": 32}),
        ("flux", "LongCatImage", {"guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]}),
    ],
    ids=["Cosmos Predict2", "HunyuanVideo", "NewBie", "LongCat-Image"],
)
def test_networks_of_the_same_classes_that_no_family_has(like, kind, change):
    model = tiny_models.with_network(kind, tiny_models.TRANSFORMERS[like][1] | change)
    with pytest.raises(SoftREPAError, match="Model is .*, expected SD1.5, SDXL, SD3, SD3.5, Lumina 2, .* or Anima"):
        apply_tokens(model, tokens_for(like))


@EVERY_TRANSFORMER
def test_tokens_of_another_family_are_refused(models, family):
    other = "zimage" if family != "zimage" else "flux"
    with pytest.raises(SoftREPAError, match=rf"are for {other} \(.*\), but this model is {FAMILIES[family].title} \("):
        apply_tokens(models[family], tokens_for(other))


@EVERY_TRANSFORMER
def test_a_files_family_is_what_it_says(models, family, tmp_path):
    tokens = tokens_for(family, banks=True)
    read = token_files.load(token_files.save(tokens, tmp_path / "mine.safetensors"))
    assert read.family is FAMILIES[family]
    assert torch.equal(read.time_table, tokens.time_table)
    assert torch.equal(read.negative_tokens, tokens.negative_tokens)
    assert token_files.summary(read)[0] == f"family      {family} ({FAMILIES[family].title})"
