"""SD1.5 and SDXL: the context of a cross-attention becomes [BOS ; soft ; rest], in every 77-token chunk."""

from contextlib import contextmanager, nullcontext

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...errors import SoftREPAError
from ...families import FAMILIES
from ..tokens.attention import key_bias
from ..tokens.call_state import CallState, Entries, Place, call_state, refuse_unweighed, with_appended
from ..training.frozen import ForeignTensors, Recomputed
from .adapter import ModelShape
from .noising import NOISINGS

CHUNK = 77
STAGES = {"down": "input", "mid": "middle", "up": "output"}
"""Our block names -> ComfyUI's."""

PATCHES, OUTPUT_PATCHES, REPLACE = "attn2_patch", "attn2_output_patch", "attn2"
REGIONS = "cond_or_uncond_couple"
"""Where Attention Couple of comfyui-ppm leaves the kind of every text that it has made of the conds."""
UNCONDITIONAL = 1
"""A kind in ComfyUI's `cond_or_uncond`: Attention Couple makes regions of all others."""


class UNet:
    """The adapter: a place is a stage of the UNet, and all cross-attentions share one bank of rows."""

    stream = "context"
    noisings = NOISINGS

    def recognised(self, network, config) -> ModelShape | None:
        width = config.get("context_dim")
        width = width[0] if isinstance(width, list) else width
        for family in FAMILIES.values():
            if isinstance(network, UNetModel) and family.stream == self.stream and family.context_width == width:
                return ModelShape(family, width, 1, f"{family.title} (context width {width})")
        return None

    def places(self, blocks) -> tuple[Place, ...]:
        return tuple(STAGES[name] for name in blocks)

    def layer(self, place: Place) -> int:
        return 0

    def blocks(self, network):
        return []

    def guard(self, model, places) -> None:
        patches = model.model_options["transformer_options"].get("patches", {}).get(PATCHES, [])
        if guard not in patches:
            model.set_model_attn2_patch(guard)

    def is_guard(self, hook) -> bool:
        return hook is guard

    def inserting(self, options: dict, state: CallState) -> dict:
        """Last of all patches, whatever the order of nodes: NegPip takes keys and values out of one context in turn,
        Attention Couple appends the texts of regions, and both must have done so before chunks are counted.
        """
        patches = dict(options.get("patches", {}))
        patches[PATCHES] = [*patches.get(PATCHES, []), insert_rows]
        if state.weighs:
            patches[OUTPUT_PATCHES] = [check_weighed, *patches.get(OUTPUT_PATCHES, [])]
        replacements = options.get("patches_replace", {})
        if REPLACE in replacements:
            watched = {
                block: Watched(replacement) if block[0] in state.rows else replacement
                for block, replacement in replacements[REPLACE].items()
            }
            replacements = replacements | {REPLACE: watched}
        return options | {"patches": patches, "patches_replace": replacements}

    def refuse_unweighable(self, options: dict, state: CallState) -> None:
        """An attn2 replacement computes attention out of our reach: it can carry soft tokens, but not weigh them."""
        for block in options.get("patches_replace", {}).get(REPLACE, {}):
            if block[0] in state.bias:
                raise SoftREPAError(
                    f"{state.label}: strength other than 0 or 1, or apply_to other than both, cannot act where another "
                    f"node replaces cross-attention (block {block[0]} {block[1]}); "
                    "expected strength 1 and apply_to both, or that node removed."
                )

    def trainable(self, model, checkpointing: bool, foreign: ForeignTensors):
        return model

    def recomputing(self, network, checkpointing: bool, foreign: ForeignTensors):
        return recomputed_blocks(network, foreign) if checkpointing else nullcontext()

    def embedder(self, network):
        return None

    def most_cells(self, network) -> int | None:
        return None


def guard(query, context, value, extra_options):
    """attn2 patch that changes nothing: refuses calls that did not go through the model's wrappers."""
    call_state(extra_options)
    return query, context, value


def insert_rows(query, context, value, extra_options):
    """attn2 patch: inserts this call's rows into context and value, (B, N, d) -> (B, N + n per chunk, d)."""
    call = call_state(extra_options)
    block = extra_options.get("block")
    if block is None:
        return query, context, value
    state = for_texts(call, len(context), len(query), extra_options)
    rows = state.rows.get(block[0])
    if rows is None:
        return query, context, value
    if block[0] in state.bias:
        chunks = chunk_count(context)
        one = key_bias(state.bias[block[0]], 1, context.shape[1] // chunks - 1)
        call.attention.expect(one.repeat(1, chunks))
    inserted = insert(context, rows)
    return query, inserted, inserted if value is context else insert(value, rows)


def check_weighed(out, extra_options):
    """attn2 output patch that changes nothing: the attention before it must have taken its bias."""
    refuse_unweighed(call_state(extra_options), " ".join(map(str, extra_options.get("block", ["cross-attention"]))))
    return out


def for_texts(state: CallState, texts: int, queries: int, extra_options: dict) -> CallState:
    """The state for what another node has made of the context: texts behind the samples', or regions."""
    samples = len(state.negative)
    if texts == samples:
        return state
    if queries == samples and texts > samples:
        return with_appended(state, texts)
    entries = regions(state, texts, extra_options)
    if entries is None:
        raise SoftREPAError(
            f"{state.label}: another node makes {texts} texts of {samples} prompts, and which are negative cannot be "
            "told; only apply_to both with uncond_bank positive works with it."
        )
    return state.for_texts(entries)


def regions(state: CallState, texts: int, extra_options: dict) -> Entries | None:
    """Whose text each entry of a regional context is; None where roles matter and cannot be known."""
    samples = len(state.negative)
    kinds, made = list(extra_options.get("cond_or_uncond", [])), extra_options.get(REGIONS, [])
    if not made or len(made) * samples != texts * len(kinds):
        is_clear = not state.has_roles and state.is_of_one_time
        return tuple((index % samples, False) for index in range(texts)) if is_clear else None
    size, regional = samples // len(kinds), len(kinds) - kinds.count(UNCONDITIONAL)
    each = (len(made) - kinds.count(UNCONDITIONAL)) // max(1, regional)
    owners = [cond for cond, kind in enumerate(kinds) for _ in range(1 if kind == UNCONDITIONAL else each)]
    return tuple((cond * size + index, state.negative[cond * size]) for cond in owners for index in range(size))


class Watched:
    """An attn2 replacement that must use the keys and values it is given, for the soft tokens are among them."""

    def __init__(self, replacement):
        self.replacement = replacement

    def __call__(self, q, k, v, extra_options):
        if torch.compiler.is_compiling():
            return self.replacement(q, k, v, extra_options)
        with Uses(k, v) as uses:
            out = self.replacement(q, k, v, extra_options)
        if not uses.all:
            block = extra_options.get("block", ("cross-attention", ""))
            raise SoftREPAError(
                f"{call_state(extra_options).label}: another node replaces cross-attention (block {block[0]} "
                f"{block[1]}) and does not use the prompt it is given, so the tokens would do nothing there; expected "
                "that node removed."
            )
        return out


class Uses(TorchFunctionMode):
    """Within it, notes which of `tensors` an operation computes with."""

    def __init__(self, *tensors: Tensor):
        super().__init__()
        self.waiting = list(tensors)

    @property
    def all(self) -> bool:
        return not self.waiting

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.waiting and any(isinstance(one, Tensor) for one in tree_leaves(result)):
            given = tree_leaves(read_by(func, args, kwargs))
            self.waiting = [tensor for tensor in self.waiting if not any(one is tensor for one in given)]
        return result


def read_by(func, args: tuple, kwargs: dict | None):
    """The arguments whose numbers `func` reads, not those of which it takes only shape, dtype or device."""
    name = getattr(func, "__name__", "")
    if name.startswith("new_") or name.endswith("_like"):
        return ()
    return args[:1] if name in FORM_OF_THE_SECOND else (args, kwargs)


FORM_OF_THE_SECOND = ("to", "type_as", "expand_as", "view_as", "reshape_as")
"""Methods that bring the first tensor into the form of the second."""


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
def recomputed_blocks(network, foreign: ForeignTensors):
    """Within it, residual and transformer blocks keep only their inputs for the backward pass and run again there."""
    blocks = [module for module in network.modules() if isinstance(module, (ResBlock, BasicTransformerBlock))]
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = Recomputed(block.forward, foreign)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
