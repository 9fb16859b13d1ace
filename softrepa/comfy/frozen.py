"""A frozen ComfyUI network inside autograd: weights loaded in inference mode, attention that has a backward."""

import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint


class OrdinaryWeights(TorchFunctionMode):
    """Within it, inference tensors enter operations as ordinary tensors over the same memory.

    Nodes run in inference mode, so checkpoints load as inference tensors, which autograd refuses to save. An alias
    costs no memory and keeps no copy.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Tensor, ordinary, (args, kwargs or {}))
        return func(*args, **kwargs)


def ordinary(tensor: Tensor) -> Tensor:
    """`tensor`, or an alias of it without its inference mark."""
    if not tensor.is_inference():
        return tensor
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def differentiable_attention(inner):
    """An `optimized_attention_override` that always takes PyTorch's attention: sage has no backward, flash raises."""

    def override(func, *args, **kwargs):
        if inner is not None:
            return inner(attention_pytorch, *args, **kwargs)
        return attention_pytorch(*args, **kwargs)

    return override


class Recomputed:
    """A block whose activations are computed again in the backward pass instead of kept."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, *args, transformer_options=None, **kwargs):
        def run(*args):
            with OrdinaryWeights():
                return self.forward(*args, **kwargs)

        if transformer_options is not None:
            kwargs["transformer_options"] = dict(transformer_options)  # a UNet goes on to write its place into it
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
