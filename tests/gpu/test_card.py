"""On a real card the same numbers come out as on a CPU, within the memory that is said."""

from functools import partial

import comfy.model_management as memory
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.comfy.training.memory_use import AdaptivePairs
from comfyui_softrepa.softrepa.comfy.training.score import HeldOut, score
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.training.loss import contrastive_loss
from comfyui_softrepa.softrepa.training.pairs import StepBatch, backward_through_pairs
from softrepa_tests import tiny_models
from softrepa_tests.editing import edit
from softrepa_tests.golden_step import TIMESTEP, batch, golden_tokens
from softrepa_tests.learning import dataset, moved_by, same_training
from softrepa_tests.sampling import relative_error, sample
from softrepa_tests.tiny_models import CPU, seeded
from softrepa_tests.token_sets import tokens_for

FAMILIES = ("sd15", "sdxl", "sd3")
CARD = torch.device("cuda", 0)
CLOSE = 1e-4
PRECISION = {torch.float16: 0.01, torch.bfloat16: 0.08}


@pytest.fixture(autouse=True)
def emptied():
    """No model of an earlier test lies on the card."""
    yield
    memory.unload_all_models()
    torch.cuda.empty_cache()


def on_card(family: str, dtype: torch.dtype | None = None, build=tiny_models.build) -> ModelPatcher:
    """The tiny model, loaded to the card when it is used."""
    model = build(family)
    if dtype is not None:
        tiny_models.compute_in(model, dtype)
    return ModelPatcher(model.model, CARD, CPU)


def larger(dtype=torch.float16) -> ModelPatcher:
    """120 MB in half precision, so that parts of it can be told from the rest of the memory."""
    return ModelPatcher(tiny_models.mmdit_of(768, 8, dtype).model, CARD, CPU)


def free_memory(free: int, device=None, torch_free_too=False):
    """ComfyUI's function of this name, for a card with `free` bytes; memory that PyTorch keeps is none of them."""
    return (free, 0) if torch_free_too else free


def half_loaded(model: ModelPatcher) -> ModelPatcher:
    """A third of its weights lie on the card, the others come when they are needed."""
    model.load(CARD, lowvram_model_memory=model.model_size() // 3)
    assert 0 < model.loaded_size() < model.model_size()
    return model


def gradient(model: ModelPatcher, blocks: int, rows, step: StepBatch, micro_batch: int, checkpointing: bool):
    """Of the contrastive loss by the rows, and the errors."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = rows.clone().requires_grad_()
        pairs = AdaptivePairs(TrainableNetwork(model, blocks, checkpointing))
        _, errors = backward_through_pairs(
            leaf, pairs, step, micro_batch, lambda e: contrastive_loss(e, 2.0, denoising_weight=1.0)
        )
    return leaf.grad.cpu(), errors.cpu()


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling(models, family, strength):
    tokens = tokens_for(family)
    expected = sample(apply_tokens(tiny_models.build(family), tokens, strength=strength), family)
    ours = sample(apply_tokens(on_card(family), tokens, strength=strength), family)
    assert relative_error(ours.cpu(), expected) <= CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_0_is_the_plain_model(family):
    model = on_card(family)
    assert torch.equal(sample(apply_tokens(model, tokens_for(family), strength=0.0), family), sample(model, family))


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_in_half_precision(family, strength, dtype):
    tokens = tokens_for(family)
    expected = sample(apply_tokens(tiny_models.build(family), tokens, strength=strength), family)
    ours = sample(apply_tokens(on_card(family, dtype), tokens, strength=strength), family)
    assert relative_error(ours.cpu(), expected) <= 2 * PRECISION[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_flowedit(family):
    tokens = tokens_for(family)
    expected = edit(apply_tokens(tiny_models.build(family), tokens), family)
    assert relative_error(edit(apply_tokens(on_card(family), tokens), family).cpu(), expected) <= CLOSE


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_training(token_folder, family, checkpointing):
    start = tokens_for(family)
    expected = moved_by(tiny_models.build(family), family, start, hard_negatives=1)
    ours = moved_by(on_card(family), family, start, hard_negatives=1, checkpointing=checkpointing)
    same_training(ours, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_agsm(token_folder, family):
    start = tokens_for(family, banks=True)
    expected = moved_by(tiny_models.build(family), family, start, preset="AGSM")
    same_training(moved_by(on_card(family), family, start, preset="AGSM"), expected)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_in_half_precision(token_folder, family, dtype):
    start = tokens_for(family)
    expected = moved_by(tiny_models.build(family), family, start)
    same_training(moved_by(on_card(family, dtype), family, start), expected, PRECISION[dtype])


@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_training_with_a_lora(token_folder, monkeypatch, family, part):
    """On a model that is loaded whole, and on one of which half fits. ComfyUI adds LoRAs up in half precision there."""
    start = golden_tokens(family)

    def with_lora(model):
        weights = model.model.diffusion_model.state_dict()
        patched = model.clone()
        changes = {name: (seeded(w.shape, name, 0.05),) for name, w in weights.items() if name.endswith("weight")}
        patched.add_patches({f"diffusion_model.{name}": change for name, change in changes.items()}, 1.0)
        return patched

    expected = moved_by(with_lora(tiny_models.golden(family)), family, start, steps=3)
    model = with_lora(on_card(family, build=tiny_models.golden))
    if part > 1:
        free = model.model_size() // part
        monkeypatch.setattr(memory, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(memory, "get_free_memory", partial(free_memory, free))
    same_training(moved_by(model, family, start, steps=3), expected, 0.02)
    assert part == 1 or 0 < model.loaded_size() < model.model_size()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score(family):
    held_out = HeldOut(dataset(family), 3, 2, 0)
    expected = score(tiny_models.build(family), held_out, (500,))
    ours = score(on_card(family), held_out, (500,))
    assert torch.allclose(ours.information.cpu(), expected.information, rtol=1e-3, atol=0.01)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_through_offloaded_weights(checkpointing):
    """The same gradients, and the weights that are fetched do not come to lie on the card."""
    rows = seeded((4, 4, 768), "rows", 0.5)
    step = StepBatch.of_all(*larger_batch(), 500)
    whole = larger()
    memory.load_models_gpu([whole])
    expected = gradient(whole, 4, rows, step, 2, checkpointing)
    memory.unload_all_models()
    model = half_loaded(larger())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = gradient(model, 4, rows, step, 1, checkpointing)
    taken = torch.cuda.max_memory_allocated() - before
    assert relative_error(found[1], expected[1]) <= 0.01
    assert relative_error(found[0], expected[0]) <= 0.02
    assert taken < (model.model_size() - model.loaded_size()) // 2


def larger_batch():
    latents = seeded((2, 16, 16, 16), "latents", 1.0)
    noise = seeded((1, 16, 16, 16), "noise", 1.0)
    texts = [seeded((1, 77, 4096), f"text {j}", 1.0) for j in range(2)]
    return latents, noise, [{"cross_attn": text, "pooled_output": seeded((1, 2048), "pooled", 1.0)} for text in texts]


def test_memory_that_runs_out_halves_the_pairs_at_once():
    """PyTorch refuses what is above a share of the card; the gradients are those of one pair at a time."""
    model = larger(torch.float32)
    memory.load_models_gpu([model])
    count = 6
    latents = seeded((count, 16, 32, 32), "latents", 1.0)
    noise = seeded((1, 16, 32, 32), "noise", 1.0)
    conds = [
        {"cross_attn": seeded((1, 77, 4096), f"t{j}", 1.0), "pooled_output": seeded((1, 2048), f"p{j}", 1.0)}
        for j in range(count)
    ]
    step, rows = StepBatch.of_all(latents, noise, conds, 500), seeded((4, 4, 768), "rows", 0.5)
    with torch.inference_mode(False), torch.enable_grad():
        expected_errors, expected = TrainableNetwork(model, 4, False).gradients(rows, step, 1)
        pairs = AdaptivePairs(TrainableNetwork(model, 4, False))
        pairs.one_by_one(rows, StepBatch.of_all(latents[:1], noise, conds[:1], 500))
        torch.cuda.empty_cache()
        room = torch.cuda.memory_reserved() + 4 * pairs.pair_bytes
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
        try:
            errors, found = pairs.gradients(rows, step, count**2)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= pairs.at_once < count**2
    assert relative_error(errors.cpu(), expected_errors.cpu()) <= CLOSE
    assert relative_error(found.cpu(), expected.cpu()) <= 1e-3


@pytest.mark.parametrize("checkpointing", [True, False])
def test_pairs_that_fill_the_memory_fit_it(monkeypatch, checkpointing):
    """With 2 GB free, the step that is sized by one measured pair stays below that."""
    model = larger()
    memory.load_models_gpu([model])
    free = 2 * 10**9
    monkeypatch.setattr(memory, "get_free_memory", partial(free_memory, free))
    count = 24
    latents = seeded((count, 16, 32, 32), "latents", 1.0)
    noise = seeded((1, 16, 32, 32), "noise", 1.0)
    conds = [
        {"cross_attn": seeded((1, 154, 4096), f"t{j}", 1.0), "pooled_output": seeded((1, 2048), f"p{j}", 1.0)}
        for j in range(count)
    ]
    step, rows = StepBatch.of_all(latents, noise, conds, 500), seeded((4, 4, 768), "rows", 0.5)
    with torch.inference_mode(False), torch.enable_grad():
        pairs = AdaptivePairs(TrainableNetwork(model, 4, checkpointing))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pairs.gradients(rows, step, 0)
        peak = torch.cuda.max_memory_allocated() - before
    assert pairs.at_once > 1
    assert peak <= free
    if pairs.at_once < count**2:
        assert peak >= free // 3, "much of the memory is left unused"


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_gradients(family):
    rows = golden_tokens(family)
    step = StepBatch.of_all(*batch(family), TIMESTEP[family])
    shape = (rows.layers, 4, rows.hidden_width)
    leaf = seeded(shape, "rows", 0.5)
    model = on_card(family, build=tiny_models.golden)
    memory.load_models_gpu([model])
    expected = gradient(tiny_models.golden(family), rows.blocks, leaf, step, 2, False)
    found = gradient(model, rows.blocks, leaf, step, 2, True)
    assert relative_error(found[1], expected[1]) <= CLOSE
    assert relative_error(found[0], expected[0]) <= 1e-3


def test_an_fp8_model_trains(token_folder):
    """Weights in eight bits, computed in bfloat16."""
    start = tokens_for("sd3")
    model = tiny_models.build("sd3")
    tiny_models.store_in(model, torch.float8_e4m3fn)
    rounded = {
        k: v.to(torch.float8_e4m3fn).float()
        for k, v in tiny_models.build("sd3").model.diffusion_model.state_dict().items()
    }
    plain = tiny_models.build("sd3")
    plain.model.diffusion_model.load_state_dict(rounded)
    expected = moved_by(plain, "sd3", start)
    same_training(moved_by(ModelPatcher(model.model, CARD, CPU), "sd3", start), expected, 0.01)
