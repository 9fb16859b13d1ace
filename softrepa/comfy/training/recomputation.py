"""Blocks that run again in the backward pass, whatever they do to their inputs, and plain operations meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

import comfy.model_management as memory
import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..tokens.call_state import KEY, Place, call_state
from .frozen import ForeignTensors


@contextmanager
def plain_operations() -> Iterator[None]:
    """Within it networks use PyTorch's operations where fused ones have no backward; a global of ComfyUI says so."""
    before = memory.in_training
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

    With `checkpointing` each keeps only its inputs and runs again for the gradient. Blocks that add to their inputs in
    place overwrite what autograd has saved: then it keeps copies of that.
    """
    with ExitStack() as undo:
        undo.enter_context(plain_operations())
        if not checkpointing:
            undo.enter_context(allow_mutation_on_saved_tensors() if adds_in_place else nullcontext())
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

    PyTorch's own checkpoint gives wrong gradients, without an error, for blocks that add in place.
    """

    def __init__(self, forward: Callable, place: Place, adds_in_place: bool, foreign: ForeignTensors):
        self.forward, self.place, self.adds_in_place, self.foreign = forward, place, adds_in_place, foreign

    def __call__(self, *args, transformer_options: dict, **kwargs):
        leaves, form = tree_flatten((args, kwargs))
        where = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        state, options = call_state(transformer_options), dict(transformer_options)
        rows = state.rows.get(self.place)

        def run(rows: Tensor | None, *tensors: Tensor):
            filled = list(leaves)
            for index, tensor in zip(where, tensors, strict=True):
                filled[index] = tensor.clone() if self.adds_in_place else tensor
            args, kwargs = tree_unflatten(filled, form)
            own = {} if rows is None else {self.place: rows}
            with self.foreign.made_ordinary():
                inner = options | {KEY: replace(state, rows=own)}
                return self.forward(*args, transformer_options=inner, **kwargs)

        around = allow_mutation_on_saved_tensors if self.adds_in_place else nullcontext
        return RunAgain.apply(run, around, rows, *(leaves[index] for index in where))


class RunAgain(torch.autograd.Function):
    """run(*tensors), a tensor or several, of which only the inputs are kept."""

    @staticmethod
    def forward(ctx, run, around, *tensors):
        ctx.run, ctx.around = run, around
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx, *gradients):
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad(), ctx.around():
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(is_needed)
                for tensor, is_needed in zip(ctx.saved_tensors, needed, strict=True)
            ]
            outputs = ctx.run(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            felt = [(one, g) for one, g in zip(outputs, gradients, strict=True) if one.requires_grad]
            wanted = [leaf for leaf, is_needed in zip(leaves, needed, strict=True) if is_needed]
            found = iter(torch.autograd.grad([one for one, _ in felt], wanted, [g for _, g in felt], allow_unused=True))
        return None, None, *(next(found) if is_needed else None for is_needed in needed)
