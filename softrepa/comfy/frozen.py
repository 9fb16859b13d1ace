"""A frozen ComfyUI network inside autograd: whatever its weights are, wherever they lie, the gradients are exact."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ..errors import SoftREPAError
from .attention import OVERRIDE, PROBE_HEADS, probe


def ordinary(tensor: Tensor) -> Tensor:
    """`tensor`, or an alias of it without its inference mark."""
    if not tensor.is_inference():
        return tensor
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


@contextmanager
def frozen(network: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it autograd can go through a loaded network, which computes on `device` in `dtype`; nothing stays on it.

    Nodes run in inference mode, so weights are inference tensors, which autograd refuses to save: aliases take their
    places, which cost no memory. Weights that are cast or fetched for each use are not saved at all (`Fetching`). No
    model may be loaded or unloaded within: an alias holds the memory, and the values, of the time it was made.
    """
    undo = []
    try:
        for module in network.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if type(tensor) in (Tensor, nn.Parameter) and tensor.is_inference():
                        undo.append(partial(held.__setitem__, name, tensor))
                        alias = ordinary(tensor)
                        held[name] = nn.Parameter(alias, requires_grad=False) if held is module._parameters else alias
            if found := fetching(module, device, dtype):
                name, forward = found
                undo.append(partial(vars(module).pop, name))
                vars(module)[name] = forward
        yield
    finally:
        for put_back in reversed(undo):
            put_back()


CASTING = "forward_comfy_cast_weights"
"""The method of ComfyUI's layers that fetches weights for one use, where they have to be."""


def fetching(module: nn.Module, device: torch.device, dtype: torch.dtype):
    """The method of a layer that fetches its weights, by name, and what does so without autograd's holding them.

    None where a layer uses its weights as they lie there. ComfyUI fetches into buffers that the layers after it use again, and what
    autograd has saved of them changes; where each layer has its own copy, the whole model would come to lie in memory.
    """
    kind = type(module)
    own = getattr(kind, CASTING, None)
    if own is None:
        return None
    weights = [weight for weight in module._parameters.values() if weight is not None]
    is_offloaded = any(weight.device != device for weight in weights)
    is_changed = any(weight.dtype != dtype for weight in weights) or module.weight_function or module.bias_function
    if not (is_offloaded or is_changed):
        return None
    plain = partial(own, module)
    if own in LINEAR:
        return CASTING, partial(when_needed, Linear, plain, module)
    if own in CONV2D and isinstance(module.padding, tuple):
        return CASTING, partial(when_needed, Conv2d, plain, module)
    if own in NORMS:
        return CASTING, partial(when_needed, Again, plain, plain)
    if is_offloaded:
        plain = partial(kind.forward, module)  # a layer of another kind, quantised perhaps, that is offloaded now
        return "forward", partial(when_needed, Again, plain, plain)
    return None


def when_needed(function, plain, what, x: Tensor, *args, **kwargs) -> Tensor:
    """By `function` where something has to come back through the layer."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return plain(x, *args, **kwargs)
    return function.apply(x, what, args, kwargs)


@contextmanager
def fetched(layer: nn.Module, like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias of a layer on the device and in the dtype of `like`, as they are for one use."""
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


class Linear(torch.autograd.Function):
    """x W^T + b by a frozen layer; the weight is fetched again for the gradient, g W."""

    @staticmethod
    def forward(ctx, x, layer, args, kwargs):
        ctx.layer = layer
        with fetched(layer, x) as (weight, bias):
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        with fetched(ctx.layer, gradient) as (weight, _):
            return gradient @ weight, None, None, None


class Conv2d(torch.autograd.Function):
    """A frozen convolution; the weight is fetched again for the gradient, its transposed convolution."""

    @staticmethod
    def forward(ctx, x, layer, args, kwargs):
        ctx.layer, ctx.shape = layer, x.shape
        with fetched(layer, x) as (weight, bias):
            return layer._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        layer = ctx.layer
        with fetched(layer, gradient) as (weight, _):
            shape = (layer.stride, layer.padding, layer.dilation, layer.groups)
            return torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, *shape), None, None, None


class Again(torch.autograd.Function):
    """Any frozen layer: it runs again for the gradient, so that what it fetched need not stay as it was."""

    @staticmethod
    def forward(ctx, x, run, args, kwargs):
        ctx.save_for_backward(x)
        ctx.run = lambda x: run(x, *args, **kwargs)
        return ctx.run(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(ctx.run(leaf), leaf, gradient)
        return found, None, None, None


_layers = comfy.ops.disable_weight_init
LINEAR = {getattr(kind, CASTING) for kind in (_layers.Linear, comfy.ops.fp8_ops.Linear)}
"""fp8 matrix products have no backward: within `frozen` such layers compute in the dtype of their input."""
CONV2D = {getattr(_layers.Conv2d, CASTING)}
NORMS = {getattr(kind, CASTING) for kind in (_layers.GroupNorm, _layers.LayerNorm, _layers.RMSNorm)}


class ForeignTensors:
    """Inference tensors that other nodes hold and their patches bring into the network.

    Autograd refuses them as it refuses weights, but they are found only when one is in the way. From then on every
    operation looks at what it is given, which costs Python time in each.
    """

    def __init__(self):
        self.are_met = False

    def made_ordinary(self) -> AbstractContextManager:
        return OrdinaryArguments() if self.are_met else nullcontext()

    def explain(self, error: RuntimeError) -> bool:
        """Whether `error` says so for the first time: then it is worth another try."""
        is_first = not self.are_met and "Inference tensors cannot be saved for backward" in str(error)
        self.are_met |= is_first
        return is_first


class OrdinaryArguments(TorchFunctionMode):
    """Within it, inference tensors enter operations as ordinary tensors over the same memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Tensor, ordinary, (args, kwargs or {}))
        return func(*args, **kwargs)


class Recomputed:
    """A block whose activations are computed again in the backward pass instead of kept."""

    def __init__(self, forward, foreign: ForeignTensors):
        self.forward, self.foreign = forward, foreign

    def __call__(self, *args, transformer_options=None, **kwargs):
        def run(*args):
            with self.foreign.made_ordinary():
                return self.forward(*args, **kwargs)

        if transformer_options is not None:
            kwargs["transformer_options"] = dict(transformer_options)  # a UNet goes on to write its place into it
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


KERNEL_TOLERANCE = 0.05
"""What quantised attention kernels differ from PyTorch's by, relative, and more."""


def differentiable_attention(options: dict, device: torch.device, dtype: torch.dtype):
    """An `optimized_attention_override` for training, in place of the one in `options`, if there is any.

    Always PyTorch's attention: sage has no backward, flash raises. An override of another node stays where gradients
    come through it, and is left out where it is only another kernel. Raises SoftREPAError where it is more than that.
    """
    inner = options.get(OVERRIDE)
    if inner is None or not gives_gradients(options, device, dtype):
        if inner is not None:
            check_only_a_kernel(inner, options, device, dtype)
        return lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)
    return lambda func, *args, **kwargs: inner(attention_pytorch, *args, **kwargs)


def gives_gradients(options: dict, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether queries, keys and values get finite gradients that are not zero through the override in `options`."""
    leaves = [tensor.requires_grad_() for tensor in probe(device, dtype)]
    try:
        seen = optimized_attention(*leaves, PROBE_HEADS, transformer_options=options)
        gradients = torch.autograd.grad(seen.float().square().sum(), leaves, allow_unused=True)
    except Exception:  # whatever a foreign kernel raises, it has no backward
        return False
    return all(one is not None and one.isfinite().all() and one.abs().sum() > 0 for one in gradients)


def check_only_a_kernel(inner, options: dict, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses an override without backward that computes something else than attention, or cannot be asked."""
    name = f"{getattr(inner, '__module__', '?')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    with torch.no_grad():
        q, k, v = probe(device, dtype)
        try:
            seen = optimized_attention(q, k, v, PROBE_HEADS, transformer_options=options).float()
        except Exception as error:  # whatever a foreign kernel raises
            found = f"fails ({error})"
        else:
            plain = attention_pytorch(q, k, v, PROBE_HEADS).float()
            if (seen - plain).norm() <= KERNEL_TOLERANCE * plain.norm():
                logging.info("SoftREPA: %s has no backward; training computes attention with PyTorch.", name)
                return
            found = "changes the result"
    raise SoftREPAError(
        f"Model has an attention override ({name}) that has no backward and {found}, expected none for training: "
        "connect the model before the node that adds it."
    )
