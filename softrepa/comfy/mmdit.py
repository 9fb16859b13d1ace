"""SD3 and SD3.5: before a joint block the text stream becomes [soft ; text], after it the soft rows are dropped."""

import torch

from .attention import key_bias
from .state import call_state

REPLACE = "dit"
BLOCK = "double_block"


def install(model, patch, layers: int) -> None:
    """Hooks the first joint blocks, running a replacement that is already there as the block."""
    replaced = model.model_options["transformer_options"].get("patches_replace", {}).get(REPLACE, {})
    for layer in range(layers):
        below = replaced.get((BLOCK, layer))
        while isinstance(below, JointBlockHook):
            below = below.below
        model.set_model_patch_replace(JointBlockHook(patch, layer, below), REPLACE, BLOCK, layer)


class JointBlockHook:
    """Replacement of one joint block: text (B, T, d) -> [soft ; text] (B, n + T, d) -> block -> text."""

    def __init__(self, patch, layer: int, below=None):
        self.patch, self.layer, self.below = patch, layer, below

    def __call__(self, args, extra):
        state = call_state(args["transformer_options"])
        rows = state.rows.get(self.layer) if state.owner is self.patch else None
        if rows is None:
            return self._run(args, extra)
        text = args["txt"]
        soft = rows.shape[1]
        if state.bias:
            state.attention.expect(key_bias(state.bias[self.layer], 0, text.shape[1] + args["img"].shape[1]))
        out = self._run(args | {"txt": torch.cat([rows.to(text.dtype), text], dim=1)}, extra)
        if state.bias:
            state.attention.expect(None)  # a replacement below may have skipped attention
        if out["txt"] is None:  # the last joint block has no text output
            return out
        return out | {"txt": out["txt"][:, soft:]}

    def _run(self, args, extra):
        return extra["original_block"](args) if self.below is None else self.below(args, extra)
