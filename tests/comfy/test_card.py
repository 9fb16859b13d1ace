"""What only a card brings about: models that are pushed out, pairs that fill it, attention without a backward."""

from types import SimpleNamespace

import comfy.ldm.modules.attention as attention
import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import comfy.model_management as memory
import pytest
import torch
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.comfy.training.memory_use import AdaptivePairs
from comfyui_softrepa.softrepa.comfy.training.score import HeldOut, score
from comfyui_softrepa.softrepa.training.pairs import StepBatch
from softrepa_tests import tiny_models
from softrepa_tests.editing import edit
from softrepa_tests.golden_step import golden_tokens
from softrepa_tests.learning import InMemory, dataset, moved_by, same_training
from softrepa_tests.of_families import UNET_AND_JOINT
from softrepa_tests.other_device import DEVICE, built, other_device
from softrepa_tests.sampling import relative_error, sample
from softrepa_tests.tiny_models import seeded
from softrepa_tests.token_sets import tokens_for

GIGABYTE = 10**9
ROWS = torch.zeros(5, 4, 8)


class Evicting(InMemory):
    """Needs the whole device to encode an image, as a large VAE does."""

    def latent(self, example):
        memory.free_memory(1e30, DEVICE)
        return super().latent(example)


def encoding_on_the_fly(family: str):
    data = dataset(family)
    data.encodings = Evicting(family)
    return data


def devices_of(model) -> list[torch.device]:
    """Where each of the network's calls computes: a model that was pushed out would go on, slowly, on the CPU."""
    devices = []
    model.model.diffusion_model.register_forward_pre_hook(lambda module, args: devices.append(args[0].device))
    return devices


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_model_that_encoding_pushes_out_comes_back_for_training(models, token_folder, monkeypatch, family):
    start = tokens_for(family)
    expected = moved_by(models[family], family, start)
    with other_device(monkeypatch):
        model = built(family)
        devices = devices_of(model)
        ours = moved_by(model, family, start, dataset=encoding_on_the_fly(family))
    assert set(devices) == {DEVICE}
    same_training(ours, expected)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_model_that_encoding_pushes_out_comes_back_for_the_score(models, monkeypatch, family):
    expected = score(models[family], HeldOut(dataset(family), 3, 2, 0), (500,))
    with other_device(monkeypatch):
        model = built(family)
        devices = devices_of(model)
        ours = score(model, HeldOut(encoding_on_the_fly(family), 3, 2, 0), (500,))
    assert set(devices) == {DEVICE}
    assert torch.allclose(ours.information, expected.information, rtol=1e-3)


@UNET_AND_JOINT
def test_a_model_that_fits_in_part(models, token_folder, monkeypatch, family):
    """ComfyUI brings the weights that stay on the CPU to the device layer by layer."""
    start = tokens_for(family)
    expected = sample(apply_tokens(models[family], start), family, steps=1)
    trained = moved_by(models[family], family, start)
    edited = edit(apply_tokens(models[family], start), family, n_max=1)
    model = built(family)
    with other_device(monkeypatch, free=model.model_size() // 2):
        same_training(moved_by(model, family, start), trained)
        assert 0 < model.loaded_size() < model.model_size()
        ours = sample(apply_tokens(model, start), family, steps=1).cpu()
        assert 0 < model.loaded_size() < model.model_size()
        assert relative_error(edit(apply_tokens(model, start), family, n_max=1), edited) <= 1e-5
    assert relative_error(ours, expected) <= 1e-5


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_lora_on_a_model_that_fits_in_part(token_folder, monkeypatch, family):
    """Loaded again before each step, ComfyUI 0.30.0 would add it to weights that have it.

    The tiny SD3 is too small to fit in part with it.
    """
    start = golden_tokens(family)

    def with_lora(model):
        weights = model.model.diffusion_model.state_dict()
        patched = model.clone()
        changes = {name: (seeded(w.shape, name, 0.05),) for name, w in weights.items() if name.endswith("weight")}
        patched.add_patches({f"diffusion_model.{name}": change for name, change in changes.items()}, 1.0)
        return patched

    expected = moved_by(with_lora(tiny_models.golden(family)), family, start, steps=3)  # its weights get changed
    model = with_lora(built(family, tiny_models.golden))
    with other_device(monkeypatch, free=model.model_size() // 2):
        same_training(moved_by(model, family, start, steps=3), expected)
        assert 0 < model.loaded_size() < model.model_size()


@pytest.fixture
def gpu(monkeypatch):
    """A card's statistics: `free` bytes, and `peak` of the last measurement."""
    card = SimpleNamespace(free=0, peak=0, allocated=3 * GIGABYTE)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: card.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: card.allocated + card.peak)
    monkeypatch.setattr(memory, "get_free_memory", lambda *_, **__: card.free)
    return card


class CountedPairs:
    """A network that only writes down how many pairs it was given at once."""

    device = torch.device("cuda")

    def __init__(self):
        self.sizes: list[int] = []

    def gradients(self, rows, batch, micro_batch):
        self.sizes.append(micro_batch)


def images(count: int) -> StepBatch:
    return StepBatch.of_all(torch.zeros(count, 1), torch.zeros(1, 1), [{}] * count, 0)


@pytest.mark.parametrize(("free", "of_a_pair"), [(20, 2), (20, 7), (5, 2), (1, 2)])
def test_pairs_at_once_fill_the_memory_and_no_more(gpu, free, of_a_pair):
    gpu.free, gpu.peak = free * GIGABYTE, of_a_pair * GIGABYTE
    network = CountedPairs()
    AdaptivePairs(network).gradients(ROWS, images(32), 0)
    measured, used = network.sizes
    assert measured == 1
    assert used == 1 or used * of_a_pair <= free
    assert used >= max(1, free // of_a_pair // 2)


def test_a_chosen_number_of_pairs_is_not_overruled(gpu):
    network = CountedPairs()
    AdaptivePairs(network).gradients(ROWS, images(4), 5)
    assert network.sizes == [5]


@UNET_AND_JOINT
def test_attention_without_a_backward_is_not_trained_through(models, token_folder, monkeypatch, family):
    """As sage attention: no exception, only a gradient of nothing."""

    @attention.wrap_attn
    def without_backward(*args, **kwargs):
        return attention.attention_pytorch(*args, **kwargs).detach()

    expected = moved_by(models[family], family, tokens_for(family))
    for module in (attention, mmdit):
        for name in ("optimized_attention", "optimized_attention_masked"):
            monkeypatch.setattr(module, name, without_backward, raising=False)
    same_training(moved_by(models[family], family, tokens_for(family)), expected)
