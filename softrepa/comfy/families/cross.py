"""Anima: the rows of a block stand behind the text that its cross-attention sees, which has no positions."""

from typing import Any

import torch

from ...errors import SoftREPAError
from ..tokens.attention import key_bias
from ..tokens.call_state import call_state
from ..training.frozen import ForeignTensors
from ..training.recomputation import rotations_have_a_backward
from .sequence import BLOCK, Wrapped

PATCHES = "attn2_patch"


class CosmosBlocks:
    """The network of Anima. Of Cosmos Predict2 it is a class of its own, which is no flow model of this kind."""

    adds_in_place = False

    def family(self, network) -> str | None:
        return "anima"

    def width(self, network) -> int:
        return network.blocks[0].cross_attn.context_dim

    def blocks(self, network):
        return {("", index): block for index, block in enumerate(network.blocks)}


class Crosses(Wrapped):
    """The adapter: a place is the index of a block, whose cross-attention gets rows of its own."""

    stream = "cross"
    architectures: Any = {"comfy.ldm.anima.model.Anima": CosmosBlocks()}

    def recomputing(self, network, checkpointing: bool, foreign: ForeignTensors):
        rotations_have_a_backward()
        return super().recomputing(network, checkpointing, foreign)

    def _hooked(self, options, network, args, kwargs):
        patches = options.get("patches", {})
        return options | {"patches": patches | {PATCHES: [*patches.get(PATCHES, []), insert_rows]}}


def insert_rows(q, k, v, pe=None, attn_mask=None, extra_options=None) -> dict:
    """attn2 patch before projection: what keys and values are made of, (B, N, d) -> (B, N + n, d)."""
    state, place = call_state(extra_options), extra_options[BLOCK[1]]
    rows = state.rows.get(place)
    if rows is None:
        return {}
    if len(k) != len(rows):
        raise SoftREPAError(
            f"{state.label}: another node gives block {place} {len(k)} texts for {len(rows)} samples, expected one "
            "for each; remove that node."
        )
    if place in state.bias:
        state.attention.expect(key_bias(state.bias[place], k.shape[1], 0))
    keys = torch.cat([k, rows.to(k.dtype)], dim=1)
    return {"k": keys, "v": keys if v is k else torch.cat([v, rows.to(v.dtype)], dim=1)}
