"""Weighing soft keys: log(strength) added to their attention logits."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import SoftREPAError

OVERRIDE = "optimized_attention_override"
"""ComfyUI's key in transformer options for a function that every attention goes through."""


class SoftKeyBias:
    """ComfyUI's `optimized_attention_override` for the attention that sees soft keys; others pass untouched.

    A hook announces the next attention by `expect`; its logits get the bias (B, N_keys) as an additive mask. `inner` is
    the override of another node; where it does not heed masks, core's own attention computes what carries a bias.
    """

    def __init__(self, inner: "Asked | None" = None, label: str = "Strength"):
        self.inner, self.label = inner, label
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
                return self.inner.override(func, q, k, v, heads, mask=mask, **kwargs)
            return func(q, k, v, heads, mask=mask, **kwargs)
        if (len(bias), bias.shape[-1]) != (len(k), k.shape[-2]):
            raise SoftREPAError(
                f"Strength: attention has {len(k)} x {k.shape[-2]} keys, expected {len(bias)} x {bias.shape[-1]}; "
                "another node changes the text after the soft tokens are inserted, and only strength 0 or 1 works "
                "with it."
            )
        mask = combined(bias[:, None].to(q.dtype), mask)
        if self.inner is not None and self.inner.heeds_masks(func, q, k, v, heads, kwargs, self.label):
            return self.inner.override(func, q, k, v, heads, mask=mask, **kwargs)
        return func(q, k, v, heads, mask=mask, **kwargs | FULL_PRECISION)


FULL_PRECISION = {"low_precision_attention": False}
"""Makes core not use a sage kernel, of which not every version takes masks."""

TOLERANCE = 0.05
"""What quantised attention kernels differ from PyTorch's by, relative, and more."""


class Asked:
    """An attention override of another node, and what it answered when it was asked whether it heeds masks.

    It is asked once for every device, dtype and size, for a node may choose its kernel by them, with the first sample
    of the call in question: keys that a mask takes away must be as if they were not there.
    """

    def __init__(self, override: Callable):
        self.override = override
        self._answers: dict[tuple, bool] = {}

    def heeds_masks(self, func, q: Tensor, k: Tensor, v: Tensor, heads: int, kwargs: dict, label: str) -> bool:
        """Raises SoftREPAError where it does not and is more than a kernel: nothing could take its place."""
        key = (q.device, q.dtype, q.shape[-2:], k.shape[-2:])
        if key not in self._answers:
            self._answers[key] = self._ask(func, q[:1], k[:1], v[:1], heads, kwargs, label)
        return self._answers[key]

    def _ask(self, func, q, k, v, heads, kwargs, label) -> bool:
        half = k.shape[-2] // 2
        tokens = 2 if kwargs.get("skip_reshape") else 1  # SD3 gives values with their heads apart, and keys not
        mask = torch.zeros(1, 1, k.shape[-2], device=q.device, dtype=q.dtype)
        mask[..., half:] = float("-inf")
        try:
            masked = self.override(func, q, k, v, heads, mask=mask, **kwargs)
            first = (one.narrow(tokens, 0, half) for one in (k, v))
            if are_close(masked, self.override(func, q, *first, heads, mask=None, **kwargs)):
                return True
        except Exception:  # whatever a foreign kernel raises, it does not take the mask
            logging.debug("SoftREPA: %s takes no mask", name_of(self.override), exc_info=True)
        plain = func(q, k, v, heads, mask=None, **kwargs | FULL_PRECISION)
        try:
            is_only_a_kernel = are_close(self.override(func, q, k, v, heads, mask=None, **kwargs), plain)
        except Exception:  # of one sample alone, say, where it counts the samples
            is_only_a_kernel = False
        if not is_only_a_kernel:
            raise SoftREPAError(
                f"{label}: strength other than 0 or 1, or apply_to other than both, cannot act under the attention "
                f"override {name_of(self.override)}, which changes the result and does not heed masks; expected "
                "strength 1 and apply_to both, or the node that adds it removed."
            )
        return False


def are_close(found: Tensor, expected: Tensor) -> bool:
    """As close as attention kernels are to one another."""
    return bool((found - expected).float().norm() <= TOLERANCE * expected.float().norm())


def name_of(function) -> str:
    """Where another node's function comes from."""
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


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
    """q, k, v (1, 64, 128) for asking an override what it does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, PROBE_TOKENS, PROBE_HEADS * PROBE_WIDTH, generator=generator).to(device, dtype)
    return q, k, v
