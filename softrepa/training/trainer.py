"""Learning soft tokens: the parameters, and the body of the training loop."""

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from ..data.dataset import Cond
from ..errors import SoftREPAError
from ..families import INIT_STD, Blocks, Family, depth
from ..tokens import BUCKETS, SoftTokens, bucket
from . import agsm, loss, optimizers
from .config import CONTRASTIVE, GUIDED, TrainingConfig
from .noising import draw_timestep
from .pairs import Guidance, Pairs, Rows, StepBatch, backward_through_pairs
from .ranks import ALONE, Ranks

ALONE_WITH_ITS_CAPTION = ("denoising", "guidance")
"""Objectives that compare an image with nothing but its own caption."""


class TrainableTokens(nn.Module):
    """Soft tokens as float32 parameters: `tokens` (L, m, d), `time_table` (100, L * hidden width), a second bank."""

    def __init__(self, start: SoftTokens):
        super().__init__()
        self.family, self.blocks, self.shape = start.family, start.blocks, start.tokens.shape
        layers = (start.layers, start.count, start.width)
        self.tokens = nn.Parameter(start.tokens.reshape(layers).clone())
        self.time_table = None if start.time_table is None else nn.Parameter(start.time_table.clone())
        second = start.negative_tokens
        self.negative_tokens = None if second is None else nn.Parameter(second.reshape(layers).clone())

    def banks(self, t: int, embed: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The rows of both banks, (2, L, m, hidden width)."""
        return torch.stack([self.rows(t, embed), self.rows(t, embed, negative=True)])

    def rows(self, t: int, embed: Callable[[Tensor], Tensor] | None = None, negative: bool = False) -> Rows:
        """As `SoftTokens.at` gives them for one timestep, with their graph."""
        rows: Tensor = self.tokens
        if negative:
            assert self.negative_tokens is not None
            rows = self.negative_tokens
        if rows.shape[-1] == self.family.embedded_width and embed is not None:
            rows = embed(rows)
        if self.time_table is not None:
            rows = rows + self.time_table[bucket(torch.tensor(t))].view(len(self.tokens), 1, -1).to(rows.device)
        return rows


@dataclass(frozen=True)
class StepRecord:
    """What one step saw, before its update. `accuracy` is NaN where captions were not compared like with like."""

    step: int
    timestep: int
    loss: float
    accuracy: float
    matching_error: float
    gradient_norm: float


class DivergedError(SoftREPAError):
    """Training has left the numbers; the last updates before it may be wrong already."""


class Trainer:
    """The loop's body: one step at a time, deterministic for a seed.

    `next_batch(batch_size)` gives latents (B, C, H, W) as the network sees them, B conds, behind them those of captions
    of other images where there are more `negatives` than the batch has, and B lists of conds of wrong captions; `empty`
    is the cond of "". Of several processes, `ranks`, all draw the same and each computes a share; the first one
    updates, and every step begins with what it has.
    """

    def __init__(
        self,
        config: TrainingConfig,
        start: SoftTokens,
        pairs: Pairs,
        next_batch,
        empty: Cond | None = None,
        ranks: Ranks = ALONE,
    ):
        if config.denoising_weight is None and config.objective in CONTRASTIVE:
            config = replace(config, denoising_weight=start.family.recipe.denoising_weight)
        self.config, self.pairs, self.next_batch, self.empty = config, pairs, next_batch, empty
        self.ranks = ranks
        self.tokens = TrainableTokens(start)
        self.teacher = copy.deepcopy(self.tokens).requires_grad_(False) if config.objective == "agsm" else None
        self.average = {key: value.detach().clone() for key, value in self.tokens.named_parameters()}
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer = optimizers.make(
            config.optimizer, self.tokens.parameters(), config.learning_rate, config.weight_decay
        )
        self.step_index = 0

    def step(self, micro_batch: int) -> StepRecord:
        """One update from `accumulation` batches. Raises DivergedError where loss or gradient is no longer a number.

        A step that does not get to its end leaves no trace.
        """
        before = self.generator.get_state()
        try:
            self.give_out()
            records = [self._accumulate(micro_batch) for _ in range(self.config.accumulation)]
            norm = self._average_gradients(len(records))
        except BaseException:
            self.generator.set_state(before)
            self.optimizer.zero_grad()
            raise
        if self.ranks.is_first:
            self._update()
        self.optimizer.zero_grad()
        self.step_index += 1
        t, value, accuracy, error = (sum(column) / len(records) for column in zip(*records, strict=True))
        return StepRecord(self.step_index, int(t), value, accuracy, error, norm)

    def give_out(self) -> None:
        """What the first of several processes has learned, to all of them."""
        teacher = [] if self.teacher is None else list(self.teacher.parameters())
        drawn = self.generator.get_state()
        average = self.average.values() if self.config.ema_decay else ()
        self.ranks.give_out([*self.tokens.parameters(), *average, *teacher, drawn])
        self.generator.set_state(drawn)

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step_index)
        self.optimizer.step()
        self._update_averages()

    def finished(self, name: str, metadata: dict[str, str]) -> SoftTokens:
        """The tokens as they are now; their running average where `ema_decay` is set."""
        source = self.average if self.config.ema_decay else dict(self.tokens.named_parameters())
        copies = {key: value.detach().clone().cpu() for key, value in source.items()}
        family, blocks = self.tokens.family, self.tokens.blocks
        shape, table, second = self.tokens.shape, copies.get("time_table"), copies.get("negative_tokens")
        second = None if second is None else second.view(shape)
        return SoftTokens(copies["tokens"].view(shape), family, blocks, table, second, metadata, name)

    def _average_gradients(self, batches: int) -> float:
        """Of `batches` added ones, clipped; returns their norm before that."""
        parameters = list(self.tokens.parameters())
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= batches
        norm = nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip or math.inf).item()
        self._check_number("gradient", norm)
        return norm

    def _check_number(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"The {name} is {value} at step {self.step_index + 1}, expected a number; "
                "try a lower learning_rate or a base model in another precision."
            )

    def _accumulate(self, micro_batch: int) -> tuple[int, float, float, float]:
        config = self.config
        latents, conds, wrong = self.next_batch(config.batch_size)
        t = draw_timestep(self.generator, config.min_timestep, config.max_timestep)
        noise = torch.randn((1, *latents.shape[1:]), generator=self.generator)
        if self.empty is not None and torch.rand((), generator=self.generator) < config.caption_dropout:
            # one at most: two equal captions in a batch would be false negatives
            dropped = int(torch.randint(len(latents), (), generator=self.generator))
            conds, wrong = list(conds), list(wrong)
            conds[dropped], wrong[dropped] = self.empty, []  # nearly right is better than nothing said
        few = 0 < config.negatives < len(latents) - 1
        order = torch.randperm(len(latents), generator=self.generator) if few else None
        compared = loss.comparison([len(captions) for captions in wrong], len(conds), config.negatives, order)
        batch = StepBatch(latents, noise, [*conds, *chain(*wrong)], t, compared)
        if config.objective in ALONE_WITH_ITS_CAPTION:
            batch = batch.matching()
        if config.objective == "agsm":
            value, errors = self._match_scores(batch, micro_batch)
        else:
            value, errors = self._contrast(batch, micro_batch, len(conds))
        self._check_number("loss", value.item())
        is_retrieval = config.objective in CONTRASTIVE  # AGSM's captions are not all read with one bank
        shared = slice(len(conds))
        accuracy = loss.retrieval_accuracy(errors[:, shared], batch.compared[:, shared]) if is_retrieval else math.nan
        return t, value.item(), accuracy, errors.diagonal().mean().item()

    def objective(self, errors: Tensor, compared: Tensor | None = None, shared: int | None = None) -> Tensor:
        """The loss on errors (B, J), where it is one of them alone; `shared` as `loss.contrastive_loss` has it."""
        config = self.config
        if config.objective in ALONE_WITH_ITS_CAPTION:
            return loss.denoising_loss(errors)
        return loss.contrastive_loss(
            errors,
            config.temperature,
            config.logit_scale,
            config.denoising_weight or 0.0,
            config.temperature_mode == "relative",
            config.symmetric,
            compared,
            shared,
            config.contrast,
        )

    def _contrast(self, batch: StepBatch, micro_batch: int, shared: int) -> tuple[Tensor, Tensor]:
        config = self.config
        # these look at the whole batch: at its mean error, and at its columns
        is_by_row = config.temperature_mode != "relative" and not config.symmetric
        objective = partial(self.objective, compared=batch.compared, shared=shared)
        value, errors = self._backward(batch, micro_batch, objective, is_by_row, self.guidance)
        if config.guidance_weight:
            learned, _ = self._backward(
                batch.matching(),
                micro_batch,
                lambda errors: config.guidance_weight * loss.denoising_loss(errors),
                is_by_row=True,
                guidance=self._guidance_of(is_learned=True),
            )
            value = value + learned
        return value, errors

    def _backward(
        self,
        batch: StepBatch,
        micro_batch: int,
        objective: Callable[[Tensor], Tensor],
        is_by_row: bool,
        guidance: Guidance | None,
    ) -> tuple[Tensor, Tensor]:
        rows = self.tokens.rows(batch.t, self.pairs.embed)
        return backward_through_pairs(
            rows, self.pairs, batch, micro_batch, objective, is_by_row, ranks=self.ranks, guidance=guidance
        )

    @property
    def guidance(self) -> Guidance | None:
        """Of the predictions whose errors are compared, or of those that are learned alone."""
        objective = self.config.objective
        return self._guidance_of(is_learned=objective == "guidance") if objective in GUIDED else None

    def _guidance_of(self, is_learned: bool) -> Guidance:
        assert self.empty is not None
        return Guidance(self.empty, self.config.guidance_scale, is_learned)

    def _match_scores(self, batch: StepBatch, micro_batch: int) -> tuple[Tensor, Tensor]:
        config = self.config
        assert self.teacher is not None
        banks, teacher = (tokens.banks(batch.t, self.pairs.embed) for tokens in (self.tokens, self.teacher))
        aims = partial(
            agsm.aims,
            temperature=config.agsm_temperature,
            positive=config.positive_guidance,
            negative=config.negative_guidance,
        )
        own, weights = batch.only(self.ranks.images(batch.compared)), agsm.pair_weights(batch.compared)
        fixed = (banks.detach(), teacher.detach())
        found = self.pairs.regression(aims, *fixed, own, weights, micro_batch)
        value, errors, gradient = (self.ranks.summed(part) for part in found)
        banks.backward(gradient.to(banks))
        return value, errors

    @torch.no_grad()
    def _update_averages(self) -> None:
        # the warm-up of the decay keeps the start out of short runs
        decay = min(self.config.ema_decay, (1 + self.step_index) / (10 + self.step_index))
        teacher = {} if self.teacher is None else dict(self.teacher.named_parameters())
        for key, value in self.tokens.named_parameters():
            self.average[key].lerp_(value.detach().to(self.average[key]), 1 - decay)
            if key in teacher:
                teacher[key].lerp_(value.detach(), 1 - self.config.teacher_decay)


def start_seed(seed: int) -> int:
    """The seed of a run's first tokens: not that of its draws, which would begin with the same numbers."""
    return int.from_bytes(hashlib.sha256(f"tokens {seed}".encode()).digest()[:8], "big") >> 1


def new_tokens(
    family: Family,
    width: int,
    n_tokens: int,
    blocks: Blocks,
    has_time_table: bool,
    seed: int,
    bos: Tensor | None,
    two_banks: bool = False,
) -> SoftTokens:
    """Tokens as the references start them: `bos` (d,) in every row where it is given, otherwise N(0, 0.02)."""
    generator = torch.Generator().manual_seed(start_seed(seed))
    layers = depth(blocks)
    tokens = torch.randn(layers, n_tokens, width, generator=generator) * INIT_STD
    if bos is not None:
        tokens = bos.float().expand_as(tokens).clone()
    table = torch.randn(BUCKETS, layers * width, generator=generator) * INIT_STD if has_time_table else None
    banks = [tokens]
    if two_banks:
        banks.append(tokens if bos is not None else torch.randn(tokens.shape, generator=generator) * INIT_STD)
    first, *second = (bank.view(family.shape(layers, n_tokens, width)) for bank in banks)
    return SoftTokens(first, family, blocks, time_table=table, negative_tokens=second[0] if second else None)
