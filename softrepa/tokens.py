"""Soft text tokens: the trained vectors and which of them a block sees at a timestep."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import SoftREPAError, shown
from .families import PADDED, Blocks, Family, depth, family_named
from .numbers import check_finite

BUCKETS = 100
"""Rows of a time table: ten timesteps share one."""

END = "end_of_sequence"
SPLICES = (END, "front_of_padding")
"""Where rows stand that take the place of padding, as anima_lora calls it: at its end, or behind the last word.

One is like the other to attention: its keys have no order, and those of padding are all the same.
"""


def bucket(timestep: Tensor, count: int = BUCKETS) -> Tensor:
    """Row of a time table of `count` rows for timesteps on the model's 0..1000 scale."""
    return (timestep * count / 1000).long().clamp(0, count - 1)


def check_padding(text: Tensor, count: int, label: str) -> None:
    """Raises SoftREPAError unless each of the texts (B, N, d) leaves `count` rows of padding, which are zeros."""
    if (text[:, -count:] != 0).any():
        rows = torch.arange(1, text.shape[1] + 1, device=text.device)
        longest = int(((text != 0).any(dim=-1) * rows).max())
        raise SoftREPAError(
            f"{label} take the place of {count} rows of a text's padding, but a text fills {longest} of "
            f"{text.shape[1]} rows, expected at most {max(0, text.shape[1] - count)}."
        )


@dataclass(frozen=True, eq=False)
class SoftTokens:
    """Soft tokens of one file, float32 on the CPU.

    tokens: (m, d) for a UNet, (L, m, d) for an MMDiT. d is the context width, or for an MMDiT also 4096.
    time_table: (100, d) or (100, L * hidden width), layer-major; None for static tokens.
    splice: one of `SPLICES` for rows that take the place of padding; their time table may have any number of rows.
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
    splice: str | None = None

    def __post_init__(self):
        for key in ("tokens", "time_table", "negative_tokens"):
            tensor = getattr(self, key)
            if tensor is not None:
                object.__setattr__(self, key, self._checked(key, tensor))
        self._check_shapes()
        self._check_blocks()
        self._check_splice()

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
        shift = self.time_table[bucket(timestep, len(self.time_table))].unflatten(1, (self.layers, -1))
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
        buckets = table[0] if self.splice and table else BUCKETS
        if self.is_text_width:
            fits = len(table) == 2 and table[0] == buckets and table[1] % self.layers == 0
            width = f"{self.layers} x the model's hidden width"
        else:
            width = str(self.layers * self.width)
            fits = table == [buckets, self.layers * self.width]
        if not fits:
            raise SoftREPAError(f"{self.label}: time_table has shape {table}, expected [{buckets}, {width}].")

    def _check_blocks(self):
        if depth(self.blocks) > self.layers:
            raise SoftREPAError(
                f"{self.label}: blocks is {self.blocks}, expected at most the file's {self.layers} layers."
            )

    def _check_splice(self):
        if self.splice is None:
            return
        if self.splice not in SPLICES:
            raise SoftREPAError(
                f'{self.label}: splice_position is "{shown(self.splice)}", expected one of {", ".join(SPLICES)}.'
            )
        if self.family is not PADDED:
            raise SoftREPAError(
                f"{self.label}: splice_position is {self.splice} for {self.family.title}, expected it for "
                f"{PADDED.title} only, whose text has padding."
            )
