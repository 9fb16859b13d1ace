"""Transformers with rotary positions: the rows of a block are further keys and values of its attention.

Rows are dropped behind each block, so inside it they act as keys and values and nothing else. The attention of a block
gets those that the block itself would make of its rows: by its own norm, the modulation of this call's time, its
projection and its norm of keys. They are not rotated, which is position 0: that of all text in Flux 1, Chroma,
HunyuanImage and Krea 2, the place before the first word in Lumina 2 and Z-Image, that of the first in Flux 2, and the
middle of the picture in Qwen-Image. Text has no positions in the cross-attention of Anima.
"""

from collections.abc import Mapping

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor, nn

from ...errors import SoftREPAError
from ...families import FAMILIES
from ...tokens import check_padding
from ..tokens.attention import OVERRIDE, key_bias
from ..tokens.call_state import KEY, CallState, Place, call_state, refuse_unweighed
from ..training.frozen import ForeignTensors
from ..training.recomputation import recomputed, rotations_have_a_backward
from .adapter import ModelShape, uncompiled
from .architectures import ARCHITECTURES, Architecture, BlockName, Modulation
from .noising import NOISINGS

BLOCK = ("block_type", "block_index")
"""Where networks write the name of the block that runs, in transformer options; some into the caller's own."""


class Sequences:
    """The adapter: a place is a block by its order, whatever its kind, and each has rows of its own."""

    stream = "sequence"
    noisings = NOISINGS

    def recognised(self, network, config) -> ModelShape | None:
        architecture = ARCHITECTURES.get(class_name(network))
        name = None if architecture is None else architecture.family(network)
        if architecture is None or name is None:
            return None
        family, width, layers = FAMILIES[name], architecture.width(network), len(architecture.blocks(network))
        return ModelShape(family, width, layers, f"{family.title} ({layers} blocks x {width})")

    def places(self, blocks) -> tuple[Place, ...]:
        return tuple(range(blocks))

    def layer(self, place: Place) -> int:
        return int(place)

    def blocks(self, network) -> list[nn.Module]:
        return list(known(network).blocks(network).values())

    def guard(self, model, places) -> None:
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, guard, model.model_options, is_model_options=True)

    def is_guard(self, hook) -> bool:
        return False  # the guard is a wrapper, which is known by its key

    def inserting(self, options: dict, state: CallState) -> dict:
        """Innermost of all wrappers: what others do to the options of the call has been done there."""
        if not (state.rows or state.is_watched):
            return options
        wrappers = options.get("wrappers", {})
        around = {key: found for key, found in wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).items() if key != KEY}
        return options | {"wrappers": wrappers | {WrappersMP.DIFFUSION_MODEL: around | {KEY: [self._enter]}}}

    def refuse_unweighable(self, options: dict, state: CallState) -> None:
        """Seen only when a block runs."""

    def trainable(self, model, checkpointing: bool, foreign: ForeignTensors):
        return model

    def recomputing(self, network, checkpointing: bool, foreign: ForeignTensors):
        architecture = known(network)
        if architecture.rotates_fused:
            rotations_have_a_backward()
        return recomputed(self.blocks(network), checkpointing, architecture.adds_in_place, foreign)

    def embedder(self, network):
        return None

    def hears_steps(self, network) -> bool:
        return known(network).hears_steps(network)

    def of_all_samples(self, network):
        return known(network).of_all_samples

    def most_cells(self, network) -> int | None:
        return None

    @torch.compiler.disable(recursive=False)
    def _enter(self, executor, *args, **kwargs):
        """DIFFUSION_MODEL wrapper: the network gets options of its own, with the hooks in them.

        ComfyUI's compile node drops guards on options, so what reads them must not be part of a graph.
        """
        options = options_among(args, kwargs)
        fresh = {key: value for key, value in options.items() if key not in BLOCK}
        architecture, state = known(executor.class_obj), call_state(options)
        if state.padding:
            check_padding(text_among(*args, **kwargs), max(state.padding.values()), state.label)
        modulation = architecture.modulation(executor.class_obj, *args, **kwargs)
        blocks = architecture.blocks(executor.class_obj)
        fresh |= architecture.hooks(fresh)
        fresh[OVERRIDE] = RowsAsKeys(architecture, blocks, modulation, options.get(OVERRIDE))
        args = tuple(fresh if one is options else one for one in args)
        out = executor(*args, **{name: fresh if one is options else one for name, one in kwargs.items()})
        if state.is_watched and not state.is_reached:
            raise SoftREPAError(
                f"{state.label}: another node runs the model's blocks in its own way, without what ComfyUI tells them, "
                "so that tokens cannot act, expected that node removed."
            )
        return out


def class_name(network: nn.Module) -> str:
    """Not every ComfyUI has all classes, and none need be imported to tell them apart."""
    return f"{type(network).__module__}.{type(network).__qualname__}"


def known(network: nn.Module) -> Architecture:
    """Of a network that has been recognised, compiled as a whole or not."""
    return ARCHITECTURES[class_name(uncompiled(network))]


def options_among(args: tuple, kwargs: dict) -> dict:
    """The transformer options of a call, which each network takes at another place; with our state in them."""
    found = [one for one in (*args, *kwargs.values()) if isinstance(one, dict) and KEY in one]
    call_state(found[0] if found else {})
    return found[0]


def text_among(x: Tensor, timestep: Tensor, context: Tensor, *args, **kwargs) -> Tensor:
    """(B, N, d), of what networks are called with."""
    return context


def guard(executor, *args, **kwargs):
    """DIFFUSION_MODEL wrapper that changes nothing: refuses calls that did not go through the model's wrappers."""
    options_among(args, kwargs)
    return executor(*args, **kwargs)


class RowsAsKeys:
    """`optimized_attention_override` of one call: what belongs to a block with rows sees them as further keys."""

    def __init__(
        self, architecture: Architecture, blocks: Mapping[BlockName, nn.Module], modulation: Modulation, below=None
    ):
        self.architecture, self.modulation, self.below = architecture, modulation, below
        self.places = {name: (place, block) for place, (name, block) in enumerate(blocks.items())}

    @torch.compiler.disable
    def __call__(self, func, q, k, v, heads, mask=None, **kwargs):
        options = kwargs["transformer_options"]
        state, name = call_state(options), (options.get(BLOCK[0]), options.get(BLOCK[1]))
        place, block = self.places.get(name, (None, None))
        state.is_reached |= place is not None
        rows = state.rows.get(place) if self.architecture.is_joint(options) and place is not None else None
        if rows is None:
            return self._attention(func, q, k, v, heads, mask, kwargs)
        if len(k) != len(rows):
            raise SoftREPAError(
                f"{state.label}: another node gives block {place} {len(k)} texts for {len(rows)} samples, expected one "
                "for each; remove that node."
            )
        if place in state.bias:
            # Keys have no order: rows stand at the place of padding where they are seen and it is not.
            state.attention.expect(key_bias(state.bias[place], k.shape[-2] - state.padding.get(place, 0), 0))
        soft = self.architecture.keys_values(name, block, rows, self.modulation)
        k, v = (with_rows(one, more) for one, more in zip((k, v), soft, strict=True))
        out = self._attention(func, q, k, v, heads, with_seen(mask, rows.shape[1]), kwargs)
        refuse_unweighed(state, f"block {place}")
        return out

    def _attention(self, func, q, k, v, heads, mask, kwargs):
        if self.below is not None:
            return self.below(func, q, k, v, heads, mask=mask, **kwargs)
        return func(q, k, v, heads, mask=mask, **kwargs)


def with_rows(sequence: Tensor, rows: Tensor) -> Tensor:
    """Keys or values (B, H, N, D) and behind them those of the rows, of as many heads or of groups of them."""
    repeats = sequence.shape[1] // rows.shape[1]
    return torch.cat([sequence, rows.to(sequence.dtype).repeat_interleave(repeats, dim=1)], dim=2)


def with_seen(mask: Tensor | None, count: int) -> Tensor | None:
    """A mask, boolean or additive, for `count` more keys, which all queries see."""
    if mask is None:
        return None
    return torch.nn.functional.pad(mask, (0, count), value=mask.dtype == torch.bool)
