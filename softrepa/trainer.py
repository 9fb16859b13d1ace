"""Learning soft tokens: the exact token gradient at the memory of one micro-batch (sections 1 and 5 of the method)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .families import TEXT_WIDTH, Blocks, Family
from .tokens import SoftTokens, bucket

Rows = Tensor
"""The rows of all layers at one timestep, (L, m, hidden width)."""

PairPass = Callable[[Rows], tuple[Tensor, Tensor]]
"""Rows -> errors (B, B) and each pair's own gradient of its error by the rows, (B, B, L, m, hidden width)."""


class TrainableTokens(nn.Module):
    """Soft tokens as float32 parameters: `tokens` (L, m, d) and, optionally, `time_table` (100, L * hidden width)."""

    def __init__(self, start: SoftTokens):
        super().__init__()
        self.family, self.blocks = start.family, start.blocks
        tokens = start.tokens if start.tokens.ndim == 3 else start.tokens.unsqueeze(0)
        self.tokens = nn.Parameter(tokens.clone())
        self.time_table = None if start.time_table is None else nn.Parameter(start.time_table.clone())

    def rows(self, t: int, embed: Callable[[Tensor], Tensor] | None = None) -> Rows:
        """As `SoftTokens.at` gives them for one timestep, with their graph."""
        rows = self.tokens
        if not self.family.is_unet and rows.shape[-1] == TEXT_WIDTH and embed is not None:
            rows = embed(rows)
        if self.time_table is not None:
            rows = rows + self.time_table[bucket(torch.tensor(t))].view(len(self.tokens), 1, -1)
        return rows

    def finished(self, name: str, metadata: dict[str, str]) -> SoftTokens:
        """A frozen copy."""
        tokens = self.tokens.detach().clone().cpu()
        table = None if self.time_table is None else self.time_table.detach().clone().cpu()
        return frozen_tokens(tokens, table, self.family, self.blocks, name, metadata)


def frozen_tokens(
    tokens: Tensor, table: Tensor | None, family: Family, blocks: Blocks, name: str, metadata: dict[str, str]
) -> SoftTokens:
    """`SoftTokens` from parameters (L, m, d)."""
    tokens = tokens[0] if family.is_unet else tokens
    return SoftTokens(tokens, family, blocks, time_table=table, name=name, metadata=metadata)


def backward_through_pairs(rows: Rows, pair_pass: PairPass, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Adds d loss / d parameters to the parameters behind `rows`; returns the loss and the errors (B, B).

    Every pair's gradient is known before the loss is, so one forward and one backward a pair are enough:
    dL/d rows = sum_ij W_ij g_ij with W = dL/dE.
    """
    errors, gradients = pair_pass(rows.detach())
    errors = errors.detach().requires_grad_()
    value = loss(errors)
    (weights,) = torch.autograd.grad(value, errors)
    rows.backward(torch.einsum("ij,ij...->...", weights.to(gradients), gradients))
    return value.detach(), errors.detach()
