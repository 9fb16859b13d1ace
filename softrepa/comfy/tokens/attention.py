"""Weighing soft keys: log(strength) added to their attention logits."""

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...errors import SoftREPAError

OVERRIDE = "optimized_attention_override"
"""ComfyUI's key in transformer options for a function that every attention goes through."""


class SoftKeyBias:
    """ComfyUI's `optimized_attention_override` for the attention that sees soft keys; others pass untouched.

    A hook announces the next attention by `expect`; its logits get the bias (B, N_keys) as an additive mask. `inner` is
    the override of another node; where it does not heed masks, core's own attention computes what carries a bias.
    """

    def __init__(self, inner=None, inner_heeds_masks: bool = True):
        self.inner, self.inner_heeds_masks = inner, inner_heeds_masks
        self.bias: Tensor | None = None

    def expect(self, bias: Tensor) -> None:
        self.bias = bias

    def take(self) -> Tensor | None:
        """The bias that was announced and that no attention has asked for yet; it is gone then."""
        bias, self.bias = self.bias, None
        return bias

    def __call__(self, func, q, k, v, heads, mask=None, **kwargs):
        bias = self.take()
        if bias is None:
            if self.inner is not None:
                return self.inner(func, q, k, v, heads, mask=mask, **kwargs)
            return func(q, k, v, heads, mask=mask, **kwargs)
        if (len(bias), bias.shape[-1]) != (len(k), k.shape[-2]):
            raise SoftREPAError(
                f"Strength: attention has {len(k)} x {k.shape[-2]} keys, expected {len(bias)} x {bias.shape[-1]}; "
                "another node changes the text after the soft tokens are inserted, and only strength 0 or 1 works "
                "with it."
            )
        mask = combined(bias[:, None].to(q.dtype), mask)
        if self.inner is not None and self.inner_heeds_masks:
            return self.inner(func, q, k, v, heads, mask=mask, **kwargs)
        return func(q, k, v, heads, mask=mask, **kwargs | {"low_precision_attention": False})


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


PROBE_TOKENS, PROBE_HEADS, PROBE_WIDTH = 64, 2, 64
"""A small attention that every kernel takes: 64 is the width of SD3's heads, and one that sage and flash know."""


def probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, 64, 128) for asking an override what it does; v is 1 in the first half of the keys, 0 in the rest."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, PROBE_TOKENS, PROBE_HEADS * PROBE_WIDTH, generator=generator).to(device, dtype)
    v = torch.zeros_like(k)
    v[:, : PROBE_TOKENS // 2] = 1
    return q, k, v


def heeds_masks(options: dict, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the attention override in `options` obeys an additive mask of the form that `SoftKeyBias` gives it."""
    q, k, v = probe(device, dtype)
    mask = torch.zeros(1, 1, PROBE_TOKENS, device=device, dtype=dtype)
    mask[..., PROBE_TOKENS // 2 :] = -20  # leaves e^-20 of the weight, which no kernel's precision shows
    try:
        seen = optimized_attention(q, k, v, PROBE_HEADS, mask=mask, transformer_options=options)
    except Exception:  # whatever a foreign kernel raises, it does not take the mask
        return False
    return bool((seen > 0.95).all())
