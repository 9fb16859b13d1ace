"""Soft tokens on transformers with rotary positions, together with what else people put on a model."""

from contextlib import ExitStack
from unittest.mock import patch

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfyui_softrepa.softrepa.comfy.families import adapter_of
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.families import FAMILIES
from softrepa_tests import foreign, tiny_models
from softrepa_tests.composing import one_by_one, same_when_compiled
from softrepa_tests.of_families import EACH_KIND
from softrepa_tests.oracle import injected
from softrepa_tests.sampling import guider, noise, prompt, record, relative_error, sample, sigmas_of
from softrepa_tests.tiny_models import seeded
from softrepa_tests.token_sets import tokens_for

EXACT = 1e-5

PROJECTIONS = {
    "lumina2": "layers.0.attention.qkv",
    "zimage": "layers.0.attention.qkv",
    "krea2": "blocks.0.attn.wk",
    "qwenimage": "transformer_blocks.0.attn.add_k_proj",
    "anima": "blocks.0.cross_attn.k_proj",
}
"""What makes keys of the rows in the first block; in Flux and what descends from it the second name below."""


def lora_for(model, family: str) -> dict[str, torch.Tensor]:
    key = PROJECTIONS.get(family, "double_blocks.0.txt_attn.qkv")
    out, inner = model.model.diffusion_model.state_dict()[f"{key}.weight"].shape
    return {
        f"diffusion_model.{key}.lora_up.weight": seeded((out, 4), "lora/up", 0.3),
        f"diffusion_model.{key}.lora_down.weight": seeded((4, inner), "lora/down", 0.3),
    }


@EACH_KIND
def test_lora(models, family):
    """It changes the keys of the rows too."""
    model, tokens, lora = models[family], tokens_for(family), lora_for(models[family], family)

    def changed(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]

    with injected(model, tokens):
        expected = sample(changed(model), family)
    assert relative_error(sample(apply_tokens(changed(model), tokens), family), expected) <= EXACT
    assert relative_error(sample(changed(apply_tokens(model, tokens)), family), expected) <= EXACT
    assert relative_error(sample(apply_tokens(model, tokens), family), expected) > 1e-4


@EACH_KIND
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


def test_torch_compile(models, family="zimage"):
    """As ComfyUI's compile node does it: the same result, and no recompilation after step 2. All are in tests/long."""
    options = {"strength": 0.5, "start_percent": 0.3, "apply_to": "positive"}
    same_when_compiled(apply_tokens(models[family], tokens_for(family), **options), family, steps=6, tolerance=EXACT)


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_in_other_dtypes(family, dtype):
    model = tiny_models.build(family)
    tiny_models.store_in(model, dtype)
    ours = sample(apply_tokens(model, tokens_for(family)), family, steps=2)
    with injected(model, tokens_for(family)):
        expected = sample(model, family, steps=2)
    assert torch.isfinite(ours).all()
    assert relative_error(ours, expected) <= EXACT


@EACH_KIND
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_half_precision_compute(family, strength):
    """As close to full precision as the plain network is."""
    model, tokens = tiny_models.build(family), tokens_for(family)

    def both():
        return [sample(one, family, steps=1) for one in (model, apply_tokens(model, tokens, strength=strength))]

    plain, full = both()
    tiny_models.compute_in(model, torch.bfloat16)
    half_plain, half = both()
    assert torch.isfinite(half).all()
    assert relative_error(half, full) < max(0.1, 1.5 * relative_error(half_plain, plain))


@EACH_KIND
def test_partial_loading_that_offloads(family, monkeypatch):
    model = tiny_models.build(family)
    expected = sample(apply_tokens(model, tokens_for(family)), family)
    patched = apply_tokens(model, tokens_for(family))
    # sampling would load the rest again
    monkeypatch.setattr("comfy.model_management.load_models_gpu", lambda *args, **kwargs: None)
    patched.partially_load(torch.device("cpu"), patched.model_size() // 3)
    patched.partially_unload(torch.device("cpu"), patched.model_size() * 2 // 3)
    offloaded = []

    def count(*_):
        modules = model.model.diffusion_model.modules()
        offloaded.append(sum(getattr(m, "prev_comfy_cast_weights", None) is not None for m in modules))

    model.model.diffusion_model.register_forward_hook(count)
    ours = sample(patched, family)
    assert min(offloaded) > 10
    assert relative_error(ours, expected) <= EXACT


@EACH_KIND
def test_a_batch_that_is_split(models, family):
    """A model function wrapper runs the prompts one by one: each gets its own role's weights."""
    patched = apply_tokens(models[family], tokens_for(family), strength=0.5, apply_to="positive")
    expected = sample(patched, family, steps=2)
    split = patched.clone()
    split.model_options["model_function_wrapper"] = one_by_one
    assert relative_error(sample(split, family, steps=2), expected) <= EXACT


def masked(family: str, name: str) -> list:
    """A prompt whose last tokens are masked away."""
    found = prompt(family, name)
    mask = torch.ones(1, found[0][0].shape[1], dtype=torch.long)
    mask[:, -3:] = 0
    found[0][1]["attention_mask"] = mask
    return found


@pytest.mark.parametrize("family", ["qwenimage", "hunyuanimage"])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_mask_of_the_text(models, family, copies):
    tokens, positive = tokens_for(family), masked(family, "positive")
    options = {"cfg": 1.0, "positive": positive}
    with injected(models[family], *[tokens] * copies):
        expected = sample(models[family], family, **options)
    ours = sample(apply_tokens(models[family], tokens, strength=float(copies)), family, **options)
    assert relative_error(ours, expected) <= EXACT
    assert relative_error(sample(apply_tokens(models[family], tokens), family, cfg=1.0), expected) > 1e-4


@EACH_KIND
@pytest.mark.parametrize("make", [foreign.drops_masks, foreign.refuses_masks])
def test_strength_under_kernels_without_masks(models, family, make):
    tokens = tokens_for(family)
    expected = sample(apply_tokens(models[family], tokens, strength=0.5), family, steps=1)
    assert (
        relative_error(sample(apply_tokens(make(models[family]), tokens, strength=0.5), family, steps=1), expected)
        <= EXACT
    )


def without(names):
    """A model function wrapper that runs the blocks in its own way: without some of ComfyUI's options, or all."""

    def call(block, plain):
        def forward(*args, **kwargs):
            options = kwargs.get("transformer_options", {})
            left = {key: value for key, value in options.items() if names and key not in names}
            return plain(*args, **kwargs | {"transformer_options": left})

        return forward

    def wrapper(apply_model, args):
        network = apply_model.__self__.diffusion_model
        blocks = adapter_of(FAMILIES["flux"]).blocks(network)
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(patch.object(block, "forward", call(block, block.forward)))
            return apply_model(args["input"], args["timestep"], **args["c"])

    return wrapper


@pytest.mark.parametrize("names", [(), ("block_type", "block_index")], ids=["no options", "blocks without names"])
@pytest.mark.parametrize("options", [{}, {"strength": 2.0, "apply_to": "positive"}, {"start_percent": 0.5}])
def test_blocks_that_no_hook_reaches_are_refused(models, names, options):
    """As PuLID and TeaCache run them for Flux: the picture would be the plain model's, without a word."""
    patched = apply_tokens(models["flux"], tokens_for("flux"), **options)
    expected = sample(patched, "flux", steps=2)
    for _ in range(2):
        own = patched.clone()
        own.set_model_unet_function_wrapper(without(names))
        with pytest.raises(SoftREPAError, match="another node runs the model's blocks in its own way"):
            sample(own, "flux", steps=2)
    assert torch.equal(sample(patched, "flux", steps=2), expected)


def test_steps_that_a_cache_leaves_out_are_no_reason(models):
    """From the second call on it runs no block and gives the output of the first."""
    patched = apply_tokens(models["flux"], tokens_for("flux"))
    network = models["flux"].model.diffusion_model
    forward, given = network.forward_orig, []

    def cached(*args, **kwargs):
        given.append(given[0] if given else forward(*args, **kwargs))
        return given[-1]

    def wrapper(apply_model, args):
        with patch.object(network, "forward_orig", cached):
            return apply_model(args["input"], args["timestep"], **args["c"])

    patched.set_model_unet_function_wrapper(wrapper)
    sample(patched, "flux", steps=4)
    assert len(given) == 4


def test_every_sampling_is_watched(models):
    """Also one with the very sigmas of the one before, as ComfyUI's cache hands them out."""
    patched = apply_tokens(models["flux"], tokens_for("flux"))
    own, sigmas = patched.clone(), sigmas_of(patched, 2)
    own.set_model_unet_function_wrapper(without(()))
    record(guider(patched, "flux"), noise("flux"), sigmas)
    for _ in range(2):
        with pytest.raises(SoftREPAError, match="another node runs the model's blocks in its own way"):
            record(guider(own, "flux"), noise("flux"), sigmas)


class FirstBlockCache(torch.nn.Module):
    """One block in place of all."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, *args, **kwargs):
        return self.blocks[0](*args, **kwargs)


@pytest.mark.parametrize(("family", "name"), [("flux", "double_blocks"), ("sd3", "joint_blocks")])
def test_other_blocks_than_the_models_own_are_refused(models, family, name):
    patched = apply_tokens(models[family], tokens_for(family))
    network = models[family].model.diffusion_model

    def wrapper(apply_model, args):
        with patch.object(network, name, torch.nn.ModuleList([FirstBlockCache(getattr(network, name))])):
            return apply_model(args["input"], args["timestep"], **args["c"])

    patched.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(SoftREPAError, match=r"another node gives the model \d+ blocks, expected its own \d+"):
        sample(patched, family, steps=1)


@EACH_KIND
def test_a_network_that_is_compiled_as_a_whole(models, family):
    """By an object patch, as nodes of other packs do it."""
    patched = apply_tokens(models[family], tokens_for(family))
    expected = sample(patched, family, steps=1)
    compiled = patched.clone()
    network = compiled.get_model_object("diffusion_model")
    compiled.add_object_patch("diffusion_model", torch.compile(network, backend="eager"))
    assert relative_error(sample(compiled, family, steps=1), expected) <= EXACT


@EACH_KIND
def test_more_texts_than_samples_are_refused(models, family):
    """As packs that append prompts inside the network do."""
    tokens = tokens_for(family)
    patched = apply_tokens(models[family], tokens)

    def twice(executor, x, timestep, context, *args, **kwargs):
        more = {name: torch.cat([one] * 2) if torch.is_tensor(one) else one for name, one in kwargs.items()}
        args = tuple(torch.cat([one] * 2) if torch.is_tensor(one) else one for one in args)
        return executor(*(torch.cat([one] * 2) for one in (x, timestep, context)), *args, **more)[: len(x)]

    patched.add_wrapper("diffusion_model", twice)
    with pytest.raises(SoftREPAError, match="another node gives block 0 4 texts for 2 samples"):
        sample(patched, family, steps=1)
