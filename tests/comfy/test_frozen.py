"""Gradients through a frozen network, whatever its weights are and wherever they lie."""

import copy
import itertools

import comfy.ops
import pytest
import torch
from comfyui_softrepa.softrepa.comfy.training.frozen import (
    Again,
    Conv2d,
    Linear,
    differentiable_attention,
    frozen,
    is_ordinary,
    when_needed,
)
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training.pairs import StepBatch
from softrepa_tests import foreign, tiny_models
from softrepa_tests.golden_step import FAMILIES, TIMESTEP, short_batch
from softrepa_tests.learning import TEXT, train
from softrepa_tests.offloading import shared_buffers
from softrepa_tests.sampling import relative_error
from softrepa_tests.tiny_models import seeded
from softrepa_tests.token_sets import tokens_for


def gradients(model, family, checkpointing=True, micro_batch=2, has_foreign=False):
    with torch.inference_mode(False), torch.enable_grad():
        tokens = tokens_for(family)
        network = TrainableNetwork(model, tokens.blocks, checkpointing)
        rows = seeded((tokens.layers, 4, tokens.hidden_width), "rows", 0.5)
        found = network.gradients(rows, StepBatch.of_all(*short_batch(family), TIMESTEP[family]), micro_batch)
        assert has_foreign or not network.foreign.are_met  # or autograd has refused a weight at first
        return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_weights_fetched_into_buffers_that_later_layers_use(models, family, checkpointing, monkeypatch):
    errors, expected = gradients(models[family], family, checkpointing)
    with shared_buffers(models[family], monkeypatch) as fetched:
        seen, found = gradients(models[family], family, checkpointing)
    assert len(set(fetched)) > 20
    assert relative_error(seen, errors) <= 1e-5
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_were_moved_outside_of_inference_mode(models, family):
    """As a model that training itself brings to a card: they bear no mark any more, and autograd refuses them still."""
    model = tiny_models.build(family)
    with torch.inference_mode(False):
        model.model._apply(torch.clone)
    weight = next(model.model.diffusion_model.parameters())
    assert not weight.is_inference()
    with pytest.raises(RuntimeError, match="version counter"):
        weight._version  # noqa: B018
    errors, expected = gradients(models[family], family)
    seen, found = gradients(model, family)
    assert torch.equal(seen, errors) and torch.equal(found, expected)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_fetched_weights_are_not_kept(models, family, monkeypatch):
    """What autograd saves for the backward pass has the shape of no weight."""
    shapes = {tuple(w.shape) for w in models[family].model.diffusion_model.parameters() if w.numel() > 4096}
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with shared_buffers(models[family], monkeypatch), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gradients(models[family], family, checkpointing=False)
    transposed = {shape[::-1] for shape in shapes}
    assert saved and not {shape for shape in saved if shape in shapes | transposed}


LAYERS = [
    (comfy.ops.manual_cast.Linear(5, 7), (2, 3, 5), Linear),
    (comfy.ops.manual_cast.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 9, 9), Conv2d),
    (comfy.ops.manual_cast.Conv2d(4, 6, 3, dilation=2, groups=2), (2, 4, 9, 9), Conv2d),
    (comfy.ops.manual_cast.GroupNorm(2, 4), (2, 4, 5, 5), Again),
    (comfy.ops.manual_cast.LayerNorm(5), (2, 3, 5), Again),
]


@pytest.mark.parametrize(("layer", "shape", "function"), LAYERS)
def test_each_kind_of_layer_against_its_own_gradient(layer, shape, function):
    with torch.inference_mode(False), torch.enable_grad():
        layer = layer.double()
        for name, weight in layer.named_parameters():
            weight.data = seeded(weight.shape, name, 1.0).double()
            weight.requires_grad_(False)
        x = seeded(shape, "x", 1.0).double().requires_grad_()
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        with frozen(layer):
            (replaced,) = (vars(layer)[name] for name in ("forward_comfy_cast_weights",))
            assert replaced.func is when_needed and replaced.args[0] is function
            assert torch.autograd.gradcheck(layer, x)
            (found,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert "forward_comfy_cast_weights" not in vars(layer)
    assert relative_error(found, expected) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_stored_in_another_dtype(family):
    """Cast for each use: exact by the weights as they are stored, and not kept."""
    with torch.inference_mode():
        model = tiny_models.build(family)
        plain = tiny_models.build(family)
    for weight in plain.model.diffusion_model.state_dict().values():
        weight.copy_(weight.to(torch.bfloat16).to(weight.dtype))
    tiny_models.store_in(model, torch.bfloat16)
    assert relative_error(gradients(model, family)[1], gradients(plain, family)[1]) <= 1e-4


operations = comfy.ops.disable_weight_init
BIASED = [
    (lambda: operations.Linear(4, 6), (4,), True),
    (lambda: operations.Linear(4, 6), (2, 3, 4), True),
    (lambda: operations.Conv1d(4, 6, 3), (2, 4, 8), True),
    (lambda: operations.Conv2d(4, 6, 3, stride=2), (2, 4, 8, 8), True),
    (lambda: operations.Conv3d(4, 6, 2, groups=2), (1, 4, 4, 4, 4), True),
    (lambda: operations.ConvTranspose2d(4, 6, 3), (2, 4, 4, 4), True),
    (lambda: operations.GroupNorm(2, 4), (2, 4, 5, 5), True),
    (lambda: operations.LayerNorm(4), (2, 3, 4), False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_moved", [False, True])
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize(("make", "shape", "stays"), BIASED)
def test_a_bias_stays_what_it_is_where_autograd_does_not_save_it(make, shape, stays, is_moved, needs_gradient, dtype):
    """Of layers that were made in inference mode, and perhaps moved outside of it."""
    layer = make().to(dtype).requires_grad_(needs_gradient)
    for name, weight in layer.named_parameters():
        weight.detach().copy_(seeded(weight.shape, name, 1.0))
    with torch.inference_mode(False), torch.enable_grad():
        if is_moved:
            layer._apply(torch.clone)
        else:
            assert layer.weight.is_inference()
        usual = copy.deepcopy(layer).requires_grad_(False)
        x, bias = seeded(shape, "x", 1.0).to(dtype).requires_grad_(), layer.bias
        assert not is_ordinary(bias)
        with frozen(layer):
            assert is_ordinary(layer.weight)
            assert (layer.bias is bias) == stays
            (found,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert layer.bias is bias
        with frozen(usual):
            (expected,) = torch.autograd.grad(usual(x).square().sum(), x)
    assert torch.equal(found, expected)


def test_a_layer_in_two_places_gets_its_weights_back():
    layer = comfy.ops.disable_weight_init.LayerNorm(4)
    before = layer.weight, layer.bias
    with torch.inference_mode(False), frozen(torch.nn.ModuleList([layer, torch.nn.Sequential(layer)])):
        assert layer.weight is not before[0]
    assert layer.weight is before[0] and layer.bias is before[1]


class Circular(comfy.ops.manual_cast.Conv2d):
    def __init__(self):
        super().__init__(4, 6, 3, padding=1, padding_mode="circular")


def circular_by_a_pack() -> torch.nn.Module:
    """As packs for seamless textures do it on a loaded model."""
    layer = comfy.ops.manual_cast.Conv2d(4, 6, 3, padding=1)

    def around(x, weight, bias):
        return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 1, 1, 1), "circular"), weight, bias)

    layer._conv_forward = around
    return layer


@pytest.mark.parametrize("make", [Circular, circular_by_a_pack])
def test_convolutions_that_pad_otherwise(make):
    with torch.inference_mode(False), torch.enable_grad():
        layer = make()
        for name, weight in layer.named_parameters():
            weight.data = seeded(weight.shape, name, 1.0)
            weight.requires_grad_(False)
        x = seeded((1, 4, 6, 6), "x", 1.0).requires_grad_()
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        with frozen(layer):
            (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert relative_error(found, expected) <= 1e-6


def test_weight_functions_are_run_again(monkeypatch):
    """As LoRAs of offloaded layers are: the layer does not cast, but its weight is made for each use."""
    with torch.inference_mode(False), torch.enable_grad():
        layer = comfy.ops.disable_weight_init.Linear(5, 7)
        layer.weight.data, layer.bias.data = seeded((7, 5), "w", 1.0), seeded((7,), "b", 1.0)
        layer.weight_function = [lambda weight: weight * 3]
        x = seeded((2, 5), "x", 1.0).requires_grad_()
        (expected,) = torch.autograd.grad(layer(x).sum(), x)
        with frozen(layer):
            assert "forward_comfy_cast_weights" in vars(layer)
            (found,) = torch.autograd.grad(layer(x).sum(), x)
    assert relative_error(found, expected) <= 1e-6


def test_nested_and_beside_another_packs_own_forward():
    layer = comfy.ops.manual_cast.Linear(5, 7)
    own = lambda x: x  # noqa: E731
    other = comfy.ops.manual_cast.Linear(5, 7)
    other.forward_comfy_cast_weights = own
    both = torch.nn.ModuleList([layer, other])
    with torch.inference_mode(False), frozen(both), frozen(both):
        assert other.forward_comfy_cast_weights is own
    assert "forward_comfy_cast_weights" not in vars(layer)
    assert other.forward_comfy_cast_weights is own


def test_attention_that_loses_the_gradient_in_some_sizes_only(models, token_folder):
    joined = (TEXT + 4, TEXT + 4 + 16)  # a text with its tokens, alone and beside an image

    def override(func, q, k, v, *args, **kwargs):
        out = func(q, k, v, *args, **kwargs)
        return out.detach() if k.shape[-2] in joined else out

    for family, checkpointing in itertools.product(("sd15", "sd3"), (False, True)):
        with pytest.raises(SoftREPAError, match="Soft .* gets? no gradient"):
            train({family: foreign.with_override(models[family], override)}, family, checkpointing=checkpointing)


def test_nothing_is_left_on_the_model(models):
    network = models["sd3"].model.diffusion_model
    before = {name: id(weight) for name, weight in network.named_parameters()}
    with torch.inference_mode(False), frozen(network):
        inside = dict(network.named_parameters())
        refused = {name.rsplit(".", 1)[-1] for name, weight in inside.items() if weight.is_inference()}
        assert refused == {"bias"}  # of layers that only add it
        assert all(weight.data_ptr() == inside[name].data_ptr() for name, weight in inside.items())
    assert {name: id(weight) for name, weight in network.named_parameters()} == before
    with pytest.raises(KeyError), torch.inference_mode(False), frozen(network):
        raise KeyError
    assert {name: id(weight) for name, weight in network.named_parameters()} == before


def test_another_nodes_inference_tensor_in_the_way(models):
    """A patch that brings a tensor made in inference mode into cross-attention, as image prompts do."""
    image = seeded((1, 3, 768), "image", 1.0)
    assert image.is_inference()
    model = models["sd15"].clone()
    model.set_model_attn2_patch(
        lambda n, context, value, extra: (n, context * (1 + image.mean(1, keepdim=True)), value * image[:, :1])
    )
    plain = models["sd15"].clone()
    with torch.inference_mode(False):
        usual = image.clone()
    plain.set_model_attn2_patch(
        lambda n, context, value, extra: (n, context * (1 + usual.mean(1, keepdim=True)), value * usual[:, :1])
    )
    for checkpointing in (True, False):
        found = gradients(model, "sd15", checkpointing, has_foreign=True)[1]
        assert relative_error(found, gradients(plain, "sd15", checkpointing)[1]) <= 1e-5


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_an_override_without_backward_is_only_a_kernel(models, family, token_folder, caplog):
    with caplog.at_level("INFO"):
        plain = train(models, family, temperature=2.0)[0]
        found = train({family: foreign.has_no_backward(models[family])}, family, temperature=2.0)[0]
    assert torch.equal(plain.tokens, found.tokens)
    assert "has no backward; training computes attention with PyTorch" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (lambda func, q, k, v, *args, **kwargs: func(q, k, 2 * v, *args, **kwargs).detach(), "changes the result"),
        (lambda func, *args, **kwargs: (_ for _ in ()).throw(ValueError("no kernel")), r"fails \(no kernel\)"),
    ],
)
def test_an_override_that_cannot_be_trained_under_is_refused(models, token_folder, override, message):
    model = foreign.with_override(models["sd3"], override)
    with pytest.raises(SoftREPAError, match=f"attention override .* that has no backward and {message}"):
        train({"sd3": model}, "sd3")


def test_an_override_that_has_a_backward_stays(models):
    def louder(func, q, k, v, *args, **kwargs):
        return func(q, k, 2 * v, *args, **kwargs)

    options = {"optimized_attention_override": louder}
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (seeded((1, 8, 64), name, 1.0) for name in "qkv")
        override = differentiable_attention(options, torch.device("cpu"), torch.float32)
        plain = differentiable_attention({}, torch.device("cpu"), torch.float32)
        assert torch.allclose(override(None, q, k, v, 1), 2 * plain(None, q, k, v, 1))
