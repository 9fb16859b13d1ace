"""SD1.5 and SDXL: the context of a cross-attention becomes [BOS ; soft ; rest], in every 77-token chunk."""

from contextlib import contextmanager

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor

from .attention import key_bias
from .frozen import Recomputed
from .state import call_state

CHUNK = 77
STAGES = {"down": "input", "mid": "middle", "up": "output"}
"""Our block names -> ComfyUI's."""

PATCHES = "attn2_patch"


def install(model, patch, before) -> None:
    """Hooks every cross-attention, where the hook of the patch `before` stands or else last."""
    hook = CrossAttentionHook(patch)
    patches = model.model_options["transformer_options"].setdefault("patches", {})
    for index, other in enumerate(patches.get(PATCHES, [])):
        if isinstance(other, CrossAttentionHook) and other.patch is before:
            patches[PATCHES][index] = hook
            return
    model.set_model_attn2_patch(hook)


class CrossAttentionHook:
    """attn2 patch: inserts this call's rows into context and value, (B, N, d) -> (B, N + n per chunk, d)."""

    def __init__(self, patch):
        self.patch = patch

    def __call__(self, query, context, value, extra_options):
        state = call_state(extra_options)
        block = extra_options.get("block")
        rows = state.rows.get(block[0]) if block is not None and state.owner is self.patch else None
        if rows is None:
            return query, context, value
        if state.bias:
            soft = state.bias[block[0]]
            chunks = chunk_count(context)
            one = key_bias(soft, 1, context.shape[1] // chunks - 1)
            state.attention.expect(one.repeat(1, chunks))
        inserted = insert(context, rows)
        return query, inserted, inserted if value is context else insert(value, rows)


def chunk_count(context: Tensor) -> int:
    """Prompt chunks in a context: one where its length is no multiple of 77."""
    length = context.shape[1]
    return length // CHUNK if length % CHUNK == 0 else 1


def insert(context: Tensor, rows: Tensor) -> Tensor:
    """Puts rows (B, n, d) after the first vector of every chunk of context (B, N, d)."""
    chunks = context.unflatten(1, (chunk_count(context), -1))
    soft = rows.to(context.dtype).unsqueeze(1).expand(-1, chunks.shape[1], -1, -1)
    return torch.cat([chunks[:, :, :1], soft, chunks[:, :, 1:]], dim=2).flatten(1, 2)


@contextmanager
def recomputed_blocks(network):
    """Within it, residual and transformer blocks keep only their inputs for the backward pass and run again there."""
    blocks = [module for module in network.modules() if isinstance(module, (ResBlock, BasicTransformerBlock))]
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = Recomputed(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
