"""Gradients of soft rows through transformers with rotary positions, against one plain graph and finite differences."""

import contextlib
import copy
import inspect
import re
import textwrap
from types import SimpleNamespace

import comfy.ldm.flux.layers
import comfy.ldm.krea2.model
import comfy.model_management
import comfy.quant_ops
import pytest
import torch
from comfy_kitchen.backends.eager.rope import rms_rope_split_half
from comfyui_softrepa.softrepa.comfy.families.noising import sigma_at
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.comfy.training.pairs import pair_errors
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.families import FAMILIES
from comfyui_softrepa.softrepa.tokens import SoftTokens
from comfyui_softrepa.softrepa.training.pairs import StepBatch
from softrepa_tests import tiny_models
from softrepa_tests.learning import TEXT, InMemory
from softrepa_tests.of_families import EACH_KIND, EVERY_TRANSFORMER
from softrepa_tests.offloading import shared_buffers
from softrepa_tests.oracle import blocks_of, injected
from softrepa_tests.sampling import relative_error, sample
from softrepa_tests.tiny_models import HIDDEN, latent_shape, seeded
from softrepa_tests.token_sets import tokens_for

BOTH_WAYS = pytest.mark.parametrize("checkpointing", [True, False])
TIME = 400


def layers_of(model) -> int:
    return len(blocks_of(model.model.diffusion_model))


def step(family: str) -> StepBatch:
    """Two images and two captions."""
    latents = seeded((2, *latent_shape(family)), f"{family}/latents", 1.0)
    conds = [InMemory(family).cond(caption) for caption in ("a cat", "two dogs")]
    return StepBatch.of_all(latents, seeded((1, *latent_shape(family)), "noise", 1.0), conds, TIME)


def rows_for(model, family: str) -> torch.Tensor:
    return seeded((layers_of(model), 4, HIDDEN[family]), "rows", 0.5)


def gradients(model, family, checkpointing=True, micro_batch=2):
    with torch.inference_mode(False), torch.enable_grad():
        network = TrainableNetwork(model, layers_of(model), checkpointing)
        found = network.gradients(rows_for(model, family), step(family), micro_batch)
        assert not network.foreign.are_met  # or autograd has refused a weight at first
        return found


@contextlib.contextmanager
def in_training(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "in_training", True)
        patch.setattr(comfy.quant_ops.ck, "rms_rope_split_half", rms_rope_split_half)
        for block in (comfy.ldm.flux.layers.DoubleStreamBlock, comfy.ldm.flux.layers.SingleStreamBlock):
            patch.setattr(block, "forward", without_adding_in_place(block.forward))
        yield


def without_adding_in_place(forward):
    """The same function, by its source."""
    source = textwrap.dedent(inspect.getsource(forward))
    changed = re.sub(r"(\w+) \+= (.*)", r"\1 = \1 + \2", source)
    assert changed != source
    found = {}
    exec(changed, vars(comfy.ldm.flux.layers), found)
    return found["forward"]


def one_graph(model, family, monkeypatch):
    """Errors and gradients of the same pairs with rows in the stream, one plain graph for each pair."""
    batch = step(family)
    errors, found = [], []
    with torch.inference_mode(False), torch.enable_grad(), in_training(monkeypatch):
        base = copy.copy(model.model)
        network = copy.deepcopy(model.model.diffusion_model).requires_grad_(False)
        base._modules = dict(base._modules) | {"diffusion_model": network}
        sigma = sigma_at(base.model_sampling, batch.t)
        for i in range(2):
            for j in range(2):
                leaf = rows_for(model, family).clone().requires_grad_()
                tokens = SimpleNamespace(tokens=leaf, time_table=None, family=FAMILIES[family], blocks=len(leaf))
                image = batch.latents[i : i + 1].clone()
                seen = (1 - sigma) * image + sigma * batch.noise.clone()
                given = {name: one.clone() for name, one in batch.conds[j].items() if one is not None}
                conds = base.extra_conds(**given, noise=image, device=torch.device("cpu"))
                conds = {name: one.cond for name, one in conds.items()}
                context = conds.pop("c_crossattn")
                with injected(SimpleNamespace(model=base), tokens):
                    options = {"sample_sigmas": torch.tensor([1.0, 0.0]), "sigmas": torch.tensor([0.5])}
                    time = base.model_sampling.timestep(sigma[None])
                    out = network(seen, time, context=context, transformer_options=options, **conds)
                error = (out - (batch.noise - image)).square().mean()
                found.append(torch.autograd.grad(error, leaf)[0])
                errors.append(error.detach())
    return torch.stack(errors).view(2, 2), torch.stack(found)


@EVERY_TRANSFORMER
@BOTH_WAYS
def test_gradients_are_those_of_one_graph(models, family, checkpointing, monkeypatch):
    expected_errors, expected = one_graph(models[family], family, monkeypatch)
    errors, found = gradients(models[family], family, checkpointing)
    assert relative_error(errors, expected_errors) <= 1e-5
    for layer in range(found.shape[1]):
        assert expected[:, layer].norm() > 0
        assert relative_error(found[:, layer], expected[:, layer]) <= 1e-4, layer
    assert comfy.model_management.in_training is False


def in_double(norm, x):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight=norm.scale.to(x) + 1.0, eps=norm.eps)


@EVERY_TRANSFORMER
@BOTH_WAYS
def test_gradients_against_finite_differences(family, checkpointing, monkeypatch):
    with torch.inference_mode():
        model = tiny_models.build(family)
    tiny_models.compute_in(model, torch.float64)
    rope = comfy.ldm.flux.layers.rope
    monkeypatch.setattr(comfy.ldm.flux.layers, "rope", lambda *args: rope(*args).double())
    monkeypatch.setattr(comfy.quant_ops.ck, "rms_rope_split_half", rms_rope_split_half)
    monkeypatch.setattr(comfy.ldm.krea2.model.RMSNorm, "forward", in_double)  # which computes in float32
    with torch.inference_mode(False), torch.enable_grad():
        network = TrainableNetwork(model, layers_of(model), checkpointing)
        sigma, seen, target, captions = network.prepared(step(family))
        texts = captions.joined([0], torch.device("cpu"))
        rows = rows_for(model, family).double()[None]
        direction = seeded(rows.shape, "direction", 1.0).double()

        def value(rows):
            return (network.output(seen[:1], sigma, texts, rows) - target[:1]).square().mean()

        leaf = rows.clone().requires_grad_()
        with network.trainable():
            (gradient,) = torch.autograd.grad(value(leaf), leaf)
            with torch.no_grad():
                steps = {s: (value(rows + s * direction) - value(rows - s * direction)) / (2 * s) for s in (1e-2, 2e-2)}
    expected = (4 * steps[1e-2] - steps[2e-2]) / 3
    assert abs((gradient * direction).sum() - expected) <= 1e-4 * abs(expected)


@EACH_KIND
@BOTH_WAYS
def test_weights_fetched_into_buffers_that_later_layers_use(models, family, checkpointing, monkeypatch):
    errors, expected = gradients(models[family], family, checkpointing)
    with shared_buffers(models[family], monkeypatch) as fetched:
        seen, found = gradients(models[family], family, checkpointing)
    assert len(set(fetched)) > 20
    assert relative_error(seen, errors) <= 1e-5
    assert relative_error(found, expected) <= 1e-4


@EACH_KIND
def test_weights_stored_in_another_dtype(family):
    with torch.inference_mode():
        model, plain = tiny_models.build(family), tiny_models.build(family)
    for weight in plain.model.diffusion_model.state_dict().values():
        weight.copy_(weight.to(torch.bfloat16).to(weight.dtype))
    tiny_models.store_in(model, torch.bfloat16)
    assert relative_error(gradients(model, family)[1], gradients(plain, family)[1]) <= 1e-4


@EACH_KIND
def test_micro_batches_and_checkpointing_change_nothing(models, family):
    errors, expected = gradients(models[family], family, checkpointing=False, micro_batch=1)
    seen, found = gradients(models[family], family, checkpointing=True, micro_batch=4)
    assert relative_error(seen, errors) <= 1e-5
    assert relative_error(found, expected) <= 1e-4


@EACH_KIND
def test_the_score_sees_the_tokens(models, family):
    """Errors by the patch equal those of training, and differ from the plain model's."""
    batch, rows = step(family), rows_for(models[family], family)
    tokens = SoftTokens.of(rows, family, len(rows))
    given = (batch.latents, batch.noise, batch.conds, batch.t)
    trained, _ = gradients(models[family], family)
    assert relative_error(pair_errors(models[family], tokens, *given, 2), trained) <= 1e-5
    assert relative_error(pair_errors(models[family], None, *given, 2), trained) > 1e-4


@EACH_KIND
@BOTH_WAYS
def test_nothing_is_left_on_the_network(models, family, checkpointing):
    network = models[family].model.diffusion_model
    gradients(models[family], family, checkpointing)
    assert not any("forward" in vars(module) for module in network.modules())
    assert comfy.model_management.in_training is False


@pytest.mark.parametrize("family", ["lumina2", "qwenimage", "hunyuanimage"])
def test_captions_of_other_lengths_masks_and_counts(models, family):
    """What an encoder says besides may be a number, and there for some captions only; each keeps its own."""
    batch, rows = step(family), rows_for(models[family], family)
    short = InMemory(family).cond("short")
    short["cross_attn"] = short["cross_attn"][:, :5]
    masked, more_masked = (
        InMemory(family).cond(f"masked {seen}") | {"rest": {"attention_mask": (torch.arange(TEXT) < seen).long()[None]}}
        for seen in (7, 3)
    )
    whole = InMemory(family).cond("whole") | {"rest": {"attention_mask": torch.ones(1, TEXT, dtype=torch.long)}}
    conds = [batch.conds[0], masked, batch.conds[1], whole, more_masked, short]  # no four in a row are of one form
    with torch.inference_mode(False), torch.enable_grad():
        network = TrainableNetwork(models[family], len(rows))
        errors, found = network.gradients(rows, StepBatch.of_all(batch.latents, batch.noise, conds, TIME), 4)
        for j, cond in enumerate(conds):
            one, gradient = network.gradients(rows, StepBatch.of_all(batch.latents, batch.noise, [cond], TIME), 1)
            assert relative_error(errors[:, j : j + 1], one) <= 1e-5
            assert relative_error(found.unflatten(0, (2, len(conds)))[:, j], gradient) <= 1e-4


def test_a_model_that_hears_the_steps_of_sampling_is_not_measured(models):
    """HunyuanImage's distilled one: it samples with tokens, and there is no error of it at a single noise level."""
    config = tiny_models.TRANSFORMERS["hunyuanimage"][1] | {"meanflow": True, "meanflow_sum": True}
    model, family = tiny_models.with_network("HunyuanImage21", config), "hunyuanimage"
    with injected(model, tokens_for(family)):
        expected = sample(model, family)
    assert relative_error(sample(apply_tokens(model, tokens_for(family)), family), expected) <= 1e-5
    assert relative_error(sample(model, family), expected) > 1e-3
    batch = step(family)
    for measured in (
        lambda: gradients(model, family),
        lambda: pair_errors(model, None, batch.latents, batch.noise, batch.conds, TIME, 2),
    ):
        with pytest.raises(SoftREPAError, match="distilled to jump from one step of its sampling to the next"):
            measured()


def test_the_words_of_anima_stay_whole_numbers(models):
    """Its own adapter of text reads them inside the network, which must give what a text read before gives."""
    batch, rows = step("anima"), rows_for(models["anima"], "anima")
    ids, weights = torch.arange(3, 12), torch.linspace(0.5, 1.5, 9)
    conds = [InMemory("anima").cond(name) | {"rest": {"t5xxl_ids": ids, "t5xxl_weights": weights}} for name in "ab"]
    adapter = models["anima"].model.diffusion_model.preprocess_text_embeds
    read = [
        {"cross_attn": adapter(cond["cross_attn"], ids[None], weights[None, :, None]), "pooled_output": None}
        for cond in conds
    ]
    with torch.inference_mode(False), torch.enable_grad():
        network = TrainableNetwork(models["anima"], len(rows))
        errors, found = network.gradients(rows, StepBatch.of_all(batch.latents, batch.noise, conds, TIME), 2)
        expected = network.gradients(rows, StepBatch.of_all(batch.latents, batch.noise, read, TIME), 2)
    assert relative_error(errors, expected[0]) <= 1e-5
    assert relative_error(found, expected[1]) <= 1e-4
