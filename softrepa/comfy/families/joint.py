"""SD3 and SD3.5: before a joint block the text stream becomes [soft ; text], after it the soft rows are dropped.

Rows as further keys and values alone, as in `sequence`, are the same function and no faster: on one CPU thread a block
of width 1536 with 154 tokens of text and 1024 of image took 0.998 of the time (8 rounds; quartiles 0.96, 1.10).
"""

from contextlib import nullcontext

import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

from ...errors import SoftREPAError
from ...families import FAMILIES
from ..tokens.attention import key_bias
from ..tokens.call_state import CallState, Place, call_state, refuse_unweighed, with_appended
from ..training.frozen import ForeignTensors
from ..training.recomputation import RecomputedBlock
from .adapter import ModelShape
from .noising import NOISINGS

REPLACE = "dit"
BLOCK = "double_block"


class Joint:
    """The adapter: a place is the index of a joint block, and each has rows of its own."""

    stream = "joint"
    noisings = NOISINGS

    def recognised(self, network, config) -> ModelShape | None:
        if not isinstance(network, MMDiT):
            return None
        family, width, layers = FAMILIES["sd3"], network.hidden_size, len(network.joint_blocks)
        return ModelShape(family, width, layers, f"{family.title} ({layers} joint blocks x {width})")

    def places(self, blocks) -> tuple[Place, ...]:
        return tuple(range(blocks))

    def layer(self, place: Place) -> int:
        return int(place)

    def blocks(self, network):
        return network.joint_blocks

    def guard(self, model, places: tuple[Place, ...]) -> None:
        for layer in places:
            below = _replacement(model.model_options["transformer_options"], layer)
            if not isinstance(below, Guard):
                model.set_model_patch_replace(Guard(layer, below), REPLACE, BLOCK, layer)

    def is_guard(self, hook) -> bool:
        return isinstance(hook, Guard) and hook.below is None

    def inserting(self, options: dict, state: CallState) -> dict:
        replacements = options.get("patches_replace", {})
        blocks = dict(replacements.get(REPLACE, {}))
        for layer in state.rows:
            blocks[BLOCK, layer] = JointBlockHook(layer, _replacement(options, layer))
        return options | {"patches_replace": replacements | {REPLACE: blocks}}

    def refuse_unweighable(self, options: dict, state: CallState) -> None:
        """Seen only when a block runs."""

    def trainable(self, model, checkpointing: bool, foreign: ForeignTensors):
        model = model.clone()
        for layer, block in enumerate(model.get_model_object("diffusion_model").joint_blocks):
            if _replacement(model.model_options["transformer_options"], layer) is None:
                model.set_model_patch_replace(TrainableBlock(block, checkpointing, foreign), REPLACE, BLOCK, layer)
        return model

    def recomputing(self, network, checkpointing: bool, foreign: ForeignTensors):
        return nullcontext()  # `TrainableBlock` does it

    def embedder(self, network):
        return network.context_embedder

    def hears_steps(self, network) -> bool:
        return False

    def of_all_samples(self, network):
        return ()

    def most_cells(self, network) -> int | None:
        has_table = isinstance(network, MMDiT) and network.pos_embed is not None
        return network.pos_embed_max_size * network.patch_size if has_table else None


def _replacement(options: dict, layer: Place):
    return options.get("patches_replace", {}).get(REPLACE, {}).get((BLOCK, layer))


class TrainableBlock:
    """A joint block, as ComfyUI's own would be when replaced, except for its checkpointing, which is out of reach."""

    def __init__(self, block, checkpointing: bool, foreign: ForeignTensors):
        self.block = RecomputedBlock(block, None, False, foreign) if checkpointing else block

    def __call__(self, args, extra):
        options, vec = args["transformer_options"], args["vec"]
        text, image = self.block(args["txt"], args["img"], c=vec, use_checkpoint=False, transformer_options=options)
        return {"txt": text, "img": image}


class Guard:
    """A joint block or the replacement `below`, in calls that went through the model's wrappers; refuses others."""

    def __init__(self, layer: Place, below=None):
        self.layer, self.below = layer, below

    def __call__(self, args, extra):
        return run_block(call_state(args["transformer_options"]), self.layer, self.below, args, extra)


class JointBlockHook:
    """Replacement of one joint block: text (B, T, d) -> [soft ; text] (B, n + T, d) -> block or `below` -> text."""

    def __init__(self, layer: Place, below=None):
        self.layer, self.below = layer, below

    def __call__(self, args, extra):
        call = call_state(args["transformer_options"])
        text, image = args["txt"], args["img"]
        state = self._for(call, len(text), len(image))
        rows = state.rows.get(self.layer)
        if rows is None:
            return run_block(call, self.layer, self.below, args, extra)
        if self.layer in state.bias:
            call.attention.expect(key_bias(state.bias[self.layer], 0, text.shape[1] + image.shape[1]))
        joined = args | {"txt": torch.cat([rows.to(text.dtype), text], dim=1)}
        out = run_block(call, self.layer, self.below, joined, extra)
        if out["img"] is image:  # a replacement that skips the block computes no attention
            call.attention.take()
        refuse_unweighed(call, f"block {self.layer}")
        if out["txt"] is None:  # the last joint block has no text output
            return out
        return out | {"txt": out["txt"][:, rows.shape[1] :]}

    def _for(self, state: CallState, texts: int, samples: int) -> CallState:
        if texts == len(state.negative):
            return state
        if samples != len(state.negative) or texts < samples:
            raise SoftREPAError(
                f"{state.label}: another node gives block {self.layer} {texts} texts for {samples} images of "
                f"{len(state.negative)} samples, expected as many texts as samples, or more behind them; "
                "remove that node."
            )
        return with_appended(state, texts)


def run_block(state: CallState, layer, below, args: dict, extra: dict) -> dict:
    """The block as ComfyUI would run it, or its replacement."""
    if below is not None:
        return below(args, extra)
    block = state.blocks[layer]
    if "forward" in vars(block):  # another pack runs the block in its own way, which its network knows
        return extra["original_block"](args)
    # Not `original_block`: it checkpoints, which without gradients only saves the random state.
    options = args["transformer_options"]
    text, image = block(args["txt"], args["img"], c=args["vec"], use_checkpoint=False, transformer_options=options)
    return {"txt": text, "img": image}
