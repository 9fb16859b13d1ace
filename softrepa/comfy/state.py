"""What the wrapper around a network call leaves for the hooks inside it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import SoftREPAError
from .attention import SoftKeyBias

KEY = "softrepa"
"""Our key in transformer options, wrappers and attachments."""

Place = int | str
"""Where rows are inserted: the index of a joint block, or a UNet stage as ComfyUI calls it."""


@dataclass
class CallState:
    """Per place the rows (B, n, d) of this call and, unless all strengths are 1, their logit bias (B, n).

    blocks: the joint blocks of the very network that is called (each device has its own); none for a UNet.
    """

    owner: Any
    rows: dict[Place, Tensor] = field(default_factory=dict)
    bias: dict[Place, Tensor] = field(default_factory=dict)
    attention: SoftKeyBias = field(default_factory=SoftKeyBias)
    blocks: Sequence[nn.Module] = ()


def call_state(options: dict) -> CallState:
    """The state of the call that `options` belong to."""
    if KEY not in options:
        raise SoftREPAError(
            "Model: the network was called without its wrappers, expected the MODEL's own transformer_options."
        )
    return options[KEY]
