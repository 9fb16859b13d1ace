"""Strength over the sampling, as ComfyUI's own Curve Editor draws it."""

from dataclasses import dataclass
from typing import Any

import comfy_api.latest  # noqa: F401  # the input module below imports it, and it the other, in a circle
from comfy_api import input as core_inputs

from ...errors import SoftREPAError, shown
from ...numbers import FROM_0, SHARE, check_number

DIGITS = 6
"""Of a value, so that what is drawn at 0 or 1 is not a rounding error off."""


@dataclass(frozen=True)
class StrengthCurve:
    """What strength is multiplied by, 0 or more, at a share of the sampling.

    core: a `CurveInput` of ComfyUI, which 0.3.75 does not have.
    """

    core: Any
    label: str

    @classmethod
    def of(cls, value: object, label: str) -> "StrengthCurve":
        """From all that `CurveInput.from_raw` reads. Raises SoftREPAError for anything else, and for points outside."""
        try:
            curve = cls(core_inputs.CurveInput.from_raw(value), label)
        except (AttributeError, KeyError, TypeError, ValueError):  # of these the first on 0.3.75
            raise SoftREPAError(f"{label} is {shown(value)}, expected what ComfyUI's Curve Editor gives.") from None
        if not curve.core.points:
            raise SoftREPAError(f"{label} has no points, expected at least one.")
        for x, y in curve.core.points:
            check_number(f"{label}: x of a point", x, SHARE)
            check_number(f"{label}: y of a point", y, FROM_0)
        return curve

    @property
    def facts(self) -> list[Any]:
        """What it is known by, for JSON: its points, and values between them, which need not follow from the points."""
        return [self.core.points, [self.at(percent / 100) for percent in range(101)]]

    def at(self, percent: float) -> float:
        value = round(self.core.interp(percent), DIGITS)
        check_number(f"{self.label} at {percent}", value, FROM_0)  # another node's curve need not pass its points
        return value
