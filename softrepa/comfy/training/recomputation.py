"""Blocks that run again in the backward pass, whatever they do to their inputs, and plain operations meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache

import comfy.model_management as memory
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..tokens.call_state import KEY, Place, call_state
from .frozen import ForeignTensors


@contextmanager
def plain_operations() -> Iterator[None]:
    """Within it networks use PyTorch's operations where fused ones have no backward; a global of ComfyUI says so."""
    before = getattr(memory, "in_training", False)  # not in ComfyUI 0.3.75
    memory.in_training = True
    try:
        yield
    finally:
        memory.in_training = before


@contextmanager
def recomputed(
    blocks: Sequence[nn.Module], checkpointing: bool, adds_in_place: bool, foreign: ForeignTensors
) -> Iterator[None]:
    """Within it autograd goes through `blocks`, the places of soft rows by index.

    With `checkpointing` each keeps only its inputs and runs again for the gradient.
    """
    with ExitStack() as undo:
        undo.enter_context(plain_operations())
        if not checkpointing:
            undo.enter_context(OutOfPlace() if adds_in_place else nullcontext())
        for place, block in enumerate(blocks if checkpointing else ()):
            own = vars(block).get("forward")
            undo.callback(restore_forward, block, own)
            block.forward = RecomputedBlock(block.forward, place, adds_in_place, foreign)
        yield


def restore_forward(block: nn.Module, own: Callable | None) -> None:
    del block.forward
    if own is not None:
        block.forward = own


class RecomputedBlock:
    """A block that keeps its inputs, soft rows among them, and runs again in the backward pass.

    `place` is None where rows are among its tensors already. PyTorch's own checkpoint gives wrong gradients, without an
    error, for blocks that add in place.
    """

    def __init__(self, forward: Callable, place: Place | None, adds_in_place: bool, foreign: ForeignTensors):
        self.forward, self.place, self.adds_in_place, self.foreign = forward, place, adds_in_place, foreign

    def __call__(self, *args, transformer_options: dict, **kwargs):
        if not torch.is_grad_enabled():
            return self.forward(*args, transformer_options=transformer_options, **kwargs)
        leaves, form = tree_flatten((args, kwargs))
        where = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        state, options = call_state(transformer_options), dict(transformer_options)
        rows = None if self.place is None else state.rows.get(self.place)

        def run(rows: Tensor | None, *tensors: Tensor):
            filled = list(leaves)
            for index, tensor in zip(where, tensors, strict=True):
                filled[index] = tensor.clone() if self.adds_in_place else tensor
            args, kwargs = tree_unflatten(filled, form)
            own = {} if self.place is None or rows is None else {self.place: rows}
            with OutOfPlace() if self.adds_in_place else nullcontext(), self.foreign.made_ordinary():
                inner = options | {KEY: replace(state, rows=own)}
                return self.forward(*args, transformer_options=inner, **kwargs)

        return RunAgain.apply(run, rows, *(leaves[index] for index in where))


class OutOfPlace(TorchFunctionMode):
    """Within it `x += y` with a graph gives x a new tensor: autograd has saved the old one.

    `torch.autograd.graph.allow_mutation_on_saved_tensors` is for the same, but knows tensors by addresses, which are
    used again: one gradient of Flux in 25 came out 2 % wrong.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.add_ and any(isinstance(one, Tensor) and one.requires_grad for one in args):
            return torch.add(*args, **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


class RunAgain(torch.autograd.Function):
    """run(*tensors), a tensor or several, of which only the inputs are kept."""

    @staticmethod
    def forward(ctx, run, *tensors):
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx, *gradients):
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(is_needed)
                for tensor, is_needed in zip(ctx.saved_tensors, needed, strict=True)
            ]
            outputs = ctx.run(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            felt = [
                (one, g) for one, g in zip(outputs, gradients, strict=True) if one is not None and one.requires_grad
            ]
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            found = iter(torch.autograd.grad([one for one, _ in felt], wanted, [g for _, g in felt], allow_unused=True))
        return None, *(next(found) if is_needed else None for is_needed in needed)


ROTATION = "rms_rope_split_half"
"""An operation of comfy-kitchen, which ComfyUI's Anima calls in training too."""


@cache
def rotations_have_a_backward() -> None:
    """Gives `ROTATION` its gradient, which is exact, unless a later comfy-kitchen has one."""
    if not hasattr(torch.ops.comfy_kitchen, ROTATION):
        return
    with torch.inference_mode(False), torch.enable_grad():
        q = torch.ones(1, 1, 1, 2, requires_grad=True)
        turn = torch.eye(2).view(1, 1, 1, 1, 2, 2)
        try:
            out, _ = getattr(torch.ops.comfy_kitchen, ROTATION)(q, q, turn, torch.ones(2), torch.ones(2), 1e-6, 0)
            torch.autograd.grad(out.sum(), q)
        except (RuntimeError, NotImplementedError):
            torch.library.register_autograd(
                f"comfy_kitchen::{ROTATION}", rotation_backward, setup_context=rotation_context
            )


def rotation_context(ctx, inputs, output) -> None:
    q, k, turns, q_scale, k_scale, ctx.epsilon, ctx.width = inputs
    scales = [q_scale.clone(), (q_scale if k_scale is None else k_scale).clone()]  # fetched ones lie in shared memory
    ctx.save_for_backward(q, k, turns, *scales)


def rotation_backward(ctx, *gradients):
    q, k, turns, *scales = ctx.saved_tensors
    found = []
    for x, scale, gradient in zip((q, k), scales, gradients, strict=True):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            out = rotated(leaf, turns, scale, ctx.epsilon, ctx.width)
            found += torch.autograd.grad(out, leaf, gradient)
    return *found, None, None, None, None, None


def rotated(x: Tensor, turns: Tensor, scale: Tensor, epsilon: float, width: int = 0) -> Tensor:
    """RMS norm over heads, then pairs (i, i + width / 2) of the first `width` numbers turned, all where it is 0."""
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], weight=scale, eps=epsilon)
    turned, rest = normed.split([width or x.shape[-1], x.shape[-1] - (width or x.shape[-1])], dim=-1)
    pairs = turned.unflatten(-1, (2, -1)).transpose(-1, -2).to(turns.dtype)
    pairs = turns[..., 0] * pairs[..., :1] + turns[..., 1] * pairs[..., 1:]
    return torch.cat([pairs.transpose(-1, -2).flatten(-2).to(x.dtype), rest], dim=-1)
