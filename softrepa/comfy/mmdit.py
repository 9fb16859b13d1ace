"""SD3 and SD3.5: before a joint block the text stream becomes [soft ; text], after it the soft rows are dropped."""

import torch

from .attention import key_bias
from .frozen import Recomputed
from .state import call_state

REPLACE = "dit"
BLOCK = "double_block"


def install(model, patch, layers: int) -> None:
    """Hooks the first joint blocks, running a replacement that is already there as the block."""
    for layer in range(layers):
        below = _replacement(model, layer)
        while isinstance(below, JointBlockHook):
            below = below.below
        model.set_model_patch_replace(JointBlockHook(patch, layer, below), REPLACE, BLOCK, layer)


def install_trainable(model, checkpointing: bool) -> None:
    """Makes every joint block that nobody replaces one that autograd can go through."""
    for layer, block in enumerate(model.get_model_object("diffusion_model").joint_blocks):
        if _replacement(model, layer) is None:
            model.set_model_patch_replace(TrainableBlock(block, checkpointing), REPLACE, BLOCK, layer)


def _replacement(model, layer: int):
    patches = model.model_options["transformer_options"].get("patches_replace", {})
    return patches.get(REPLACE, {}).get((BLOCK, layer))


class TrainableBlock:
    """A joint block, as ComfyUI's own would be when replaced, except for its checkpointing, which is out of reach."""

    def __init__(self, block, checkpointing: bool):
        self.block = Recomputed(block) if checkpointing else block

    def __call__(self, args, extra):
        options, vec = args["transformer_options"], args["vec"]
        text, image = self.block(args["txt"], args["img"], c=vec, use_checkpoint=False, transformer_options=options)
        return {"txt": text, "img": image}


class JointBlockHook:
    """Replacement of one joint block: text (B, T, d) -> [soft ; text] (B, n + T, d) -> block -> text."""

    def __init__(self, patch, layer: int, below=None):
        self.patch, self.layer, self.below = patch, layer, below

    def __call__(self, args, extra):
        state = call_state(args["transformer_options"])
        rows = state.rows.get(self.layer) if state.owner is self.patch else None
        if rows is None:
            return self._run(state, args, extra)
        text = args["txt"]
        soft = rows.shape[1]
        if state.bias:
            state.attention.expect(key_bias(state.bias[self.layer], 0, text.shape[1] + args["img"].shape[1]))
        out = self._run(state, args | {"txt": torch.cat([rows.to(text.dtype), text], dim=1)}, extra)
        if state.bias:
            state.attention.expect(None)  # a replacement below may have skipped attention
        if out["txt"] is None:  # the last joint block has no text output
            return out
        return out | {"txt": out["txt"][:, soft:]}

    def _run(self, state, args, extra):
        if self.below is not None:
            return self.below(args, extra)
        # Not `extra["original_block"]`: it checkpoints, which without gradients only saves the random state.
        block, options = state.blocks[self.layer], args["transformer_options"]
        text, image = block(args["txt"], args["img"], c=args["vec"], use_checkpoint=False, transformer_options=options)
        return {"txt": text, "img": image}
