"""Which numbers an input takes, in a widget or a tensor; NaN and infinity never.

ComfyUI's own range check lets NaN through.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SoftREPAError


@dataclass(frozen=True)
class Numbers:
    """Finite numbers for which `holds`; `text` says which."""

    text: str
    holds: Callable[[float], bool]


def at_least(low: float) -> Numbers:
    return Numbers(f"{low} or more", lambda value: value >= low)


FROM_0 = at_least(0)
ABOVE_0 = Numbers("more than 0", lambda value: value > 0)
SHARE = Numbers("0 to 1", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = Numbers("0 to below 1", lambda value: 0 <= value < 1)


def check_number(name: str, value: float, expected: Numbers) -> None:
    if not (math.isfinite(value) and expected.holds(value)):
        raise SoftREPAError(f"{name} is {value}, expected {expected.text}.")


def check_finite(name: str, values: Tensor) -> None:
    wrong = values.numel() - int(torch.isfinite(values).sum())
    if wrong:
        raise SoftREPAError(f"{name} has {wrong} NaN or infinite values, expected finite numbers.")
