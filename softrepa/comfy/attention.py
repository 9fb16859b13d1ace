"""Weighing soft keys: log(strength) added to their attention logits."""

import torch
from torch import Tensor

from ..errors import SoftREPAError


class SoftKeyBias:
    """ComfyUI's `optimized_attention_override` for the attention that sees soft keys; others pass untouched.

    A hook announces the next attention by `expect`; its logits get the bias (B, N_keys) as an additive mask.
    """

    def __init__(self, inner=None):
        self.inner = inner
        self.bias: Tensor | None = None

    def expect(self, bias: Tensor | None) -> None:
        self.bias = bias

    def __call__(self, func, q, k, v, heads, mask=None, **kwargs):
        bias, self.bias = self.bias, None
        if bias is not None:
            if bias.shape[-1] != k.shape[-2]:
                raise SoftREPAError(
                    f"Strength: attention has {k.shape[-2]} keys, expected {bias.shape[-1]}; another node changes the "
                    "text after the soft tokens are inserted, and only strength 0 or 1 works with it."
                )
            mask = combined(bias[:, None].to(q.dtype), mask)
        if self.inner is not None:
            return self.inner(func, q, k, v, heads, mask=mask, **kwargs)
        return func(q, k, v, heads, mask=mask, **kwargs)


def combined(bias: Tensor, mask: Tensor | None) -> Tensor:
    """The sum of our additive bias (B, 1, N_keys) and a mask that is there already, boolean or additive."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=bias.dtype).masked_fill_(~mask, float("-inf"))
    return bias.unsqueeze(1) + mask if mask.ndim == 4 else bias + mask


def key_bias(soft: Tensor, before: int, after: int) -> Tensor:
    """Bias of all keys, (B, before + n + after), from that of the soft keys (B, n)."""
    return torch.nn.functional.pad(soft, (before, after))
