"""Soft text tokens: the trained vectors and which of them a block sees at a timestep."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import SoftREPAError, shown
from .families import Blocks, Family, depth, family_named
from .numbers import check_finite

BUCKETS = 100
"""Rows of a time table: ten timesteps share one."""


def bucket(timestep: Tensor) -> Tensor:
    """Row of the time table for timesteps on the model's 0..1000 scale."""
    return timestep.long().clamp(0, 999) // 10


@dataclass(frozen=True, eq=False)
class SoftTokens:
    """Soft tokens of one file, float32 on the CPU.

    tokens: (m, d) for a UNet, (L, m, d) for an MMDiT. d is the context width, or for an MMDiT also 4096.
    time_table: (100, d) or (100, L * hidden width), layer-major; None for static tokens.
    negative_tokens: a second bank for the unconditional half, shaped like `tokens`; the time table is shared.
    blocks: where the file says they act; metadata: the file's other strings.
    """

    tokens: Tensor
    family: Family
    blocks: Blocks
    time_table: Tensor | None = None
    negative_tokens: Tensor | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    name: str = "tokens"

    def __post_init__(self):
        for key in ("tokens", "time_table", "negative_tokens"):
            tensor = getattr(self, key)
            if tensor is not None:
                object.__setattr__(self, key, self._checked(key, tensor))
        self._check_shapes()
        self._check_blocks()

    @classmethod
    def of(cls, tokens: Tensor, family: str, blocks: Blocks, **rest) -> "SoftTokens":
        """Like the constructor, with the family by name."""
        return cls(tokens, family_named(family, f'Tokens "{shown(rest.get("name", "tokens"))}"'), blocks, **rest)

    @property
    def label(self) -> str:
        return f'Tokens "{shown(self.name)}"'

    @property
    def layers(self) -> int:
        """Banks of rows, L; 1 where all places share one."""
        return self.tokens.shape[:-2].numel()

    @property
    def count(self) -> int:
        """Soft tokens m per layer."""
        return self.tokens.shape[-2]

    @property
    def width(self) -> int:
        return self.tokens.shape[-1]

    @property
    def hidden_width(self) -> int | None:
        """Width inside the model; None when only the model knows (4096-wide tokens without a time table)."""
        if self.time_table is not None:
            return self.time_table.shape[1] // self.layers
        return None if self.is_text_width else self.width

    @property
    def is_text_width(self) -> bool:
        """Whether the rows first go through the model's context embedder."""
        return self.width == self.family.embedded_width

    @property
    def shape_text(self) -> str:
        return self.family.size_text(self.layers, self.width)

    def at(self, timestep: Tensor, negative: bool = False, embed: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Rows for each layer: timestep (B,) -> (B, L, m, hidden width).

        `embed` is the model's context embedder, applied to 4096-wide rows before the time table is added.
        """
        rows = self.negative_tokens if negative and self.negative_tokens is not None else self.tokens
        rows = rows.view(self.layers, self.count, self.width)
        if self.is_text_width and embed is not None:
            rows = embed(rows)
        if self.time_table is None:
            return rows.expand(len(timestep), -1, -1, -1)
        shift = self.time_table[bucket(timestep)].unflatten(1, (self.layers, -1))
        return rows + shift.unsqueeze(2)

    def to(self, device: torch.device) -> "SoftTokens":
        """A copy with its tensors on `device`."""
        if device == self.tokens.device:
            return self
        moved = object.__new__(SoftTokens)
        for key, value in self.__dict__.items():
            object.__setattr__(moved, key, value.to(device) if isinstance(value, Tensor) else value)
        return moved

    def _checked(self, key: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise SoftREPAError(f"{self.label}: {key} is {kind}, expected floating-point numbers.")
        if tensor.numel() == 0:
            raise SoftREPAError(f"{self.label}: {key} is empty, of shape {list(tensor.shape)}, expected some vectors.")
        tensor = tensor.detach().float()
        check_finite(f"{self.label}: {key}", tensor)
        return tensor

    def _check_shapes(self):
        if not self.family.fits(self.tokens.shape):
            raise SoftREPAError(
                f"{self.label}: tokens have shape {list(self.tokens.shape)}, "
                f"expected {self.family.shape_text} for {self.family.title}."
            )
        if self.negative_tokens is not None and self.negative_tokens.shape != self.tokens.shape:
            raise SoftREPAError(
                f"{self.label}: negative_tokens have shape {list(self.negative_tokens.shape)}, "
                f"expected that of tokens, {list(self.tokens.shape)}."
            )
        if self.time_table is None:
            return
        table = list(self.time_table.shape)
        if self.is_text_width:
            fits = len(table) == 2 and table[0] == BUCKETS and table[1] % self.layers == 0
            width = f"{self.layers} x the model's hidden width"
        else:
            width = str(self.layers * self.width)
            fits = table == [BUCKETS, self.layers * self.width]
        if not fits:
            raise SoftREPAError(f"{self.label}: time_table has shape {table}, expected [{BUCKETS}, {width}].")

    def _check_blocks(self):
        if depth(self.blocks) > self.layers:
            raise SoftREPAError(
                f"{self.label}: blocks is {self.blocks}, expected at most the file's {self.layers} layers."
            )
