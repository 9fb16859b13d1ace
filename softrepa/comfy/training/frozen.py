"""A frozen ComfyUI network inside autograd: whatever its weights are, wherever they lie, the gradients are exact."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import comfy.ops
import torch
import torch.nn.functional as F
import torch.nn.grad
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ...errors import SoftREPAError
from ..tokens.attention import OVERRIDE, PROBE_HEADS, are_close, name_of, probe


def ordinary(tensor: Tensor) -> Tensor:
    """`tensor`, or an alias of it without its inference mark."""
    return tensor if is_ordinary(tensor) else alias(tensor)


def alias(tensor: Tensor) -> Tensor:
    """An ordinary tensor over the same memory, which needs no gradient."""
    source = tensor.detach() if tensor.requires_grad else tensor
    return tensor.new_empty(0).set_(source)  # type: ignore[call-overload]  # PyTorch's stub knows storages only


def is_ordinary(tensor: Tensor) -> bool:
    """Whether autograd can save it.

    A parameter that was made in inference mode and moved to another device outside of it bears no mark any more, but
    still counts no versions.
    """
    if tensor.is_inference():
        return False
    try:
        tensor._version  # noqa: B018
    except RuntimeError:
        return False
    return True


HELD = (nn.Parameter, Tensor)
"""Exact types of weights and buffers; quantised ones go through autograd in their layers' way."""

ADD_BIAS = (nn.Linear, _ConvNd, nn.GroupNorm)
"""Layers that only add their bias: autograd does not save it, and it may stay what it is."""


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within it autograd can go through a loaded network; nothing stays on it.

    Nodes run in inference mode, so weights are inference tensors, which autograd refuses to save: aliases take their
    places, which cost no memory. Weights that are cast or fetched for each use are not saved at all (`fetching`). No
    model may be loaded or unloaded within: an alias holds the memory, and the values, of the time it was made.

    It is entered at each step, while a GPU waits; hence all that spares it Python's time.
    """
    replaced: list[tuple[dict, str, Tensor]] = []
    given: list[tuple[dict, str]] = []
    try:
        for module in layers(network):
            added = "bias" if isinstance(module, ADD_BIAS) else None
            stores: tuple[dict, dict] = (module._parameters, module._buffers)
            for held in stores:
                for name, tensor in held.items():
                    if name != added and type(tensor) in HELD:  # an ordinary one as well: to ask takes as long
                        replaced.append((held, name, tensor))
                        held[name] = alias(tensor)
            if isinstance(module, comfy.ops.CastWeightBiasOp) and fetches(module):
                name, forward = fetching(module)
                if name not in vars(module):  # or it is another pack's own, which goes through autograd as it is
                    given.append((vars(module), name))
                    vars(module)[name] = forward
        yield
    finally:
        for held, name, tensor in reversed(replaced):
            held[name] = tensor
        for own, name in given:
            del own[name]


def layers(network: nn.Module) -> list[nn.Module]:
    """As `network.modules()` in a tenth of the time, but one that stands in two places comes twice."""
    found = [network]
    for module in found:  # it grows meanwhile
        found += [child for child in module._modules.values() if child is not None]
    return found


CASTING = "forward_comfy_cast_weights"
"""The method of ComfyUI's layers that fetches weights for one use, where they have to be."""


def fetches(layer: comfy.ops.CastWeightBiasOp) -> bool:
    """Whether a layer's weights are cast, patched or brought to the device for each use, as ComfyUI's layers ask it."""
    return bool(layer.comfy_cast_weights or layer.weight_function or layer.bias_function)


def fetching(layer: nn.Module) -> tuple[str, Callable]:
    """A method of a layer, by name, and what takes its place so that autograd holds no weights.

    ComfyUI fetches into buffers that the layers after it use again, and what autograd has saved of them would change;
    where each layer gets a copy of its own, the whole model would come to lie in memory.
    """
    kind = type(layer)
    own = getattr(kind, CASTING, None)
    plain = partial(own or kind.forward, layer)
    if own in LINEAR:
        return CASTING, partial(when_needed, Linear, plain, layer)
    if own in CONV2D and is_plain_convolution(layer):
        return CASTING, partial(when_needed, Conv2d, plain, layer)
    if own in OTHERS:
        return CASTING, partial(when_needed, Again, plain, plain)
    plain = partial(kind.forward, layer)  # a layer of another kind, quantised perhaps, whose `forward` does more
    return "forward", partial(when_needed, Again, plain, plain)


def is_plain_convolution(layer: nn.Module) -> bool:
    """Whether a 2-D convolution pads with zeros, in PyTorch's way; packs for seamless textures change that."""
    pads_plainly = layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return pads_plainly and "_conv_forward" not in vars(layer)


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


LINEAR = {getattr(kind, CASTING) for kind in (comfy.ops.disable_weight_init.Linear, comfy.ops.fp8_ops.Linear)}
"""fp8 matrix products have no backward: within `frozen` such layers compute in the dtype of their input."""
CONV2D = {getattr(comfy.ops.disable_weight_init.Conv2d, CASTING)}
OTHERS = {
    getattr(getattr(comfy.ops.disable_weight_init, name), CASTING)
    for name in ("GroupNorm", "LayerNorm", "RMSNorm", "Conv1d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d")
    if hasattr(comfy.ops.disable_weight_init, name)  # older versions lack some
}


REFUSALS = ("Inference tensors cannot be saved for backward", "Inference tensors do not track version counter")
"""What autograd says to what `is_ordinary` is not."""


class SavedBytes(saved_tensors_hooks):
    """Within it autograd keeps nothing; `bytes` counts what it would have kept, a storage once, `weights` aside."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__(self._count, _not_kept)
        self.bytes = 0
        self._known = {StorageWeakRef(weight.untyped_storage()) for weight in weights}  # its address is not used again

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (known := StorageWeakRef(storage)) not in self._known:
            self._known.add(known)
            self.bytes += storage.nbytes()


def _not_kept(_):
    raise RuntimeError("A pass that was only counted has no way back.")


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
        is_first = not self.are_met and any(text in str(error) for text in REFUSALS)
        self.are_met |= is_first
        return is_first


class OrdinaryArguments(TorchFunctionMode):
    """Within it, inference tensors enter operations as ordinary tensors over the same memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Tensor, ordinary, (args, kwargs or {}))
        return func(*args, **kwargs)


class Recomputed:
    """A block whose activations are computed again in the backward pass instead of kept, bit for bit.

    `RecomputedBlock` takes less of Python's time, but sums a block's own gradients first, and a UNet's skip connections
    come to the same tensors.
    """

    def __init__(self, forward, foreign: ForeignTensors):
        self.forward, self.foreign = forward, foreign

    def __call__(self, *args, transformer_options=None, **kwargs):
        def run(*args):
            with self.foreign.made_ordinary():
                return self.forward(*args, **kwargs)

        if transformer_options is not None:
            kwargs["transformer_options"] = dict(transformer_options)  # a UNet goes on to write its place into it
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def differentiable_attention(options: dict, device: torch.device, dtype: torch.dtype):
    """An `optimized_attention_override` for training, in place of the one in `options`, if there is any.

    Always PyTorch's attention: sage has no backward, flash raises. An override of another node stays where gradients
    come through it, and is left out where it is only another kernel. Raises SoftREPAError where it is more than that.
    """
    inner = options.get(OVERRIDE)
    if inner is None or not gives_gradients(options, device, dtype):
        if inner is not None:
            check_only_a_kernel(inner, options, device, dtype)
        return above_pytorch(None)
    return above_pytorch(inner)


def above_pytorch(inner):
    """An attention override: another node's above PyTorch's attention, or that alone."""
    if inner is None:
        return lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)
    return lambda func, *args, **kwargs: inner(attention_pytorch, *args, **kwargs)


def asked(options: dict, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the override in `options` makes of PyTorch's attention, as it is called in training."""
    within = {"transformer_options": options, "_inside_attn_wrapper": True}
    return options[OVERRIDE](attention_pytorch, q, k, v, PROBE_HEADS, mask=None, **within)


def gives_gradients(options: dict, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether queries, keys and values get finite gradients that are not zero through the override in `options`."""
    leaves = [tensor.requires_grad_() for tensor in probe(device, dtype)]
    try:
        seen = asked(options, *leaves)
        gradients = torch.autograd.grad(seen.float().square().sum(), leaves, allow_unused=True)
    except Exception:  # whatever a foreign kernel raises, it has no backward
        return False
    return all(one is not None and one.isfinite().all() and one.abs().sum() > 0 for one in gradients)


def check_only_a_kernel(inner, options: dict, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses an override without backward that computes something else than attention, or cannot be asked."""
    with torch.no_grad():
        q, k, v = probe(device, dtype)
        try:
            seen = asked(options, q, k, v).float()
        except Exception as error:  # whatever a foreign kernel raises
            found = f"fails ({error})"
        else:
            plain = attention_pytorch(q, k, v, PROBE_HEADS).float()
            if are_close(seen, plain):
                logging.info("SoftREPA: %s has no backward; training computes attention with PyTorch.", name_of(inner))
                return
            found = "changes the result"
    raise SoftREPAError(
        f"Model has an attention override ({name_of(inner)}) that has no backward and {found}, expected none for "
        "training: connect the model before the node that adds it."
    )
