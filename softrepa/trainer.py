"""Learning soft tokens: the exact token gradient at the memory of one micro-batch (sections 1 and 5 of the method)."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from . import agsm, loss, optimizers
from .dataset import Cond
from .errors import SoftREPAError
from .families import INIT_STD, TEXT_WIDTH, Blocks, Family
from .noising import draw_timestep
from .swaps import MOST
from .tokens import BUCKETS, SoftTokens, bucket

Rows = Tensor
"""The rows of all layers at one timestep, (L, m, hidden width)."""

OBJECTIVES = ("contrastive", "denoising", "agsm")
"""The paper's; its plain denoising loss alone, to see what the contrast adds; its successor's (`softrepa.agsm`)."""

TEMPERATURE_MODES = ("fixed", "relative")
LEAST_RELATIVE = 0.2
"""Below it exp(-e / tau) vanishes again: 1 / 0.2 is e / tau of a mean error."""

USED_BY = {
    "denoising_weight": ("contrastive",),
    "temperature": ("contrastive",),
    "temperature_mode": ("contrastive",),
    "logit_scale": ("contrastive",),
    "symmetric": ("contrastive",),
    "hard_negatives": ("contrastive", "agsm"),
    "agsm_temperature": ("agsm",),
    "positive_guidance": ("agsm",),
    "negative_guidance": ("agsm",),
    "teacher_decay": ("agsm",),
}
"""Settings that not every objective has."""

Aims = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`agsm.aims` with its constants."""

PairPass = Callable[[Rows], tuple[Tensor, Tensor]]
"""Rows -> errors (B, J) and the gradient of each compared pair's error by the rows, (P, L, m, hidden width)."""


class TrainableTokens(nn.Module):
    """Soft tokens as float32 parameters: `tokens` (L, m, d), `time_table` (100, L * hidden width), a second bank."""

    def __init__(self, start: SoftTokens):
        super().__init__()
        self.family, self.blocks = start.family, start.blocks
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
        if not self.family.is_unet and rows.shape[-1] == TEXT_WIDTH and embed is not None:
            rows = embed(rows)
        if self.time_table is not None:
            rows = rows + self.time_table[bucket(torch.tensor(t))].view(len(self.tokens), 1, -1).to(rows.device)
        return rows


def backward_through_pairs(
    rows: Rows, pair_pass: PairPass, objective: Callable[[Tensor], Tensor], compared: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Adds d loss / d parameters to the parameters behind `rows`; returns the loss and the errors (B, J).

    Every pair's gradient is known before the loss is, so one forward and one backward a pair are enough:
    dL/d rows = sum_ij W_ij g_ij with W = dL/dE.
    """
    errors, gradients = pair_pass(rows.detach())
    errors = errors.detach().requires_grad_()
    value = objective(errors)
    (weights,) = torch.autograd.grad(value, errors)
    weights = weights.flatten() if compared is None else weights[compared.to(weights.device)]
    combined = torch.einsum("p,p...->...", weights.to(gradients), gradients)
    rows.backward(combined.to(rows.device))
    return value.detach(), errors.detach()


@dataclass(frozen=True)
class TrainingConfig:
    """What decides a run; the defaults are the reference's. `denoising_weight` None is the family's.

    What is neither the paper's nor AGSM's: `temperature_mode` and `symmetric` (`loss.contrastive_loss`), and
    `hard_negatives`, up to how many captions wrong by two swapped words each image is compared with as well.
    """

    steps: int
    batch_size: int = 4
    learning_rate: float = 1e-3
    optimizer: str = optimizers.DEFAULT
    seed: int = 0
    temperature: float = loss.TEMPERATURE
    logit_scale: float = loss.LOGIT_SCALE
    denoising_weight: float | None = None
    weight_decay: float = 1e-4
    minimum_learning_rate: float = 1e-5
    schedule_steps: int = 500
    restart_after: int = 10
    warmup_steps: int = 0
    gradient_clip: float = 0.0
    accumulation: int = 1
    ema_decay: float = 0.0
    caption_dropout: float = 0.0
    objective: str = "contrastive"
    temperature_mode: str = "fixed"
    symmetric: bool = False
    hard_negatives: int = 0
    agsm_temperature: float = agsm.TEMPERATURE
    positive_guidance: float = agsm.POSITIVE_GUIDANCE
    negative_guidance: float = agsm.NEGATIVE_GUIDANCE
    teacher_decay: float = agsm.TEACHER_DECAY

    def __post_init__(self):
        optimizers.check(self.optimizer)
        for name, known in (("objective", OBJECTIVES), ("temperature_mode", TEMPERATURE_MODES)):
            if getattr(self, name) not in known:
                raise SoftREPAError(f'{name} is "{getattr(self, name)}", expected one of {", ".join(known)}.')
        least = {"steps": 1, "batch_size": 2, "accumulation": 1, "warmup_steps": 0, "hard_negatives": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise SoftREPAError(f"{name} is {getattr(self, name)}, expected {low} or more.")
        guidance = ("positive_guidance", "negative_guidance")
        for name in ("learning_rate", "weight_decay", "gradient_clip", "denoising_weight", *guidance):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise SoftREPAError(f"{name} is {value}, expected 0 or more.")
        for name in ("temperature", "logit_scale", "agsm_temperature"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise SoftREPAError(f"{name} is {getattr(self, name)}, expected more than 0.")
        for name in ("ema_decay", "caption_dropout", "teacher_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise SoftREPAError(f"{name} is {getattr(self, name)}, expected 0 to below 1.")
        if self.hard_negatives > MOST:
            raise SoftREPAError(f"hard_negatives is {self.hard_negatives}, expected at most {MOST}.")
        if self.temperature_mode == "relative" and self.temperature < LEAST_RELATIVE:
            raise SoftREPAError(
                f"temperature is {self.temperature}, expected about 1 with temperature_mode relative: it is a multiple "
                "of the batch's mean error."
            )
        for name, objectives in USED_BY.items():
            default = type(self).__dataclass_fields__[name].default
            if self.objective not in objectives and getattr(self, name) != default:
                raise SoftREPAError(
                    f"{name} is {getattr(self, name)}, expected its default, {default}, with objective "
                    f"{self.objective}, which does not use it."
                )

    def learning_rate_at(self, step: int) -> float:
        """Cosine annealing with warm restarts, moved on every `schedule_steps` iterations, after a linear warm-up."""
        turn = step // self.schedule_steps % self.restart_after / self.restart_after
        low = min(self.minimum_learning_rate, self.learning_rate)
        rate = low + (self.learning_rate - low) * (1 + math.cos(math.pi * turn)) / 2
        return rate * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else rate


@dataclass(frozen=True)
class StepRecord:
    """What one step saw, before its update. `accuracy` is NaN where captions were not compared like with like."""

    step: int
    timestep: int
    loss: float
    accuracy: float
    matching_error: float
    gradient_norm: float


class Pairs(Protocol):
    """The frozen model on image-caption pairs (`softrepa.comfy.pairs.PairNetwork`)."""

    def gradients(
        self, rows: Rows, latents: Tensor, noise: Tensor, conds: list[Cond], t: int, micro_batch: int, compared: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def regression(
        self,
        aims: Aims,
        banks: Tensor,
        teacher: Tensor,
        latents: Tensor,
        noise: Tensor,
        conds: list[Cond],
        t: int,
        micro_batch: int,
        compared: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def embed(self, rows: Tensor) -> Tensor: ...


class Trainer:
    """The loop's body: one step at a time, deterministic for a seed.

    `next_batch(batch_size)` gives latents (B, C, H, W) as the network sees them, B conds, and B lists of conds of wrong
    captions; `empty` is the cond of "".
    """

    def __init__(self, config: TrainingConfig, start: SoftTokens, pairs: Pairs, next_batch, empty: Cond | None = None):
        if config.denoising_weight is None and config.objective == "contrastive":
            config = replace(config, denoising_weight=start.family.recipe.denoising_weight)
        self.config, self.pairs, self.next_batch, self.empty = config, pairs, next_batch, empty
        self.tokens = TrainableTokens(start)
        self.teacher = copy.deepcopy(self.tokens).requires_grad_(False) if config.objective == "agsm" else None
        self.average = {key: value.detach().clone() for key, value in self.tokens.named_parameters()}
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer = optimizers.make(
            config.optimizer, self.tokens.parameters(), config.learning_rate, config.weight_decay
        )
        self.step_index = 0

    def step(self, micro_batch: int) -> StepRecord:
        """One update from `accumulation` batches. Raises SoftREPAError when the loss is no longer a number.

        A step that does not get to its end leaves no trace.
        """
        before = self.generator.get_state()
        try:
            records = [self._accumulate(micro_batch) for _ in range(self.config.accumulation)]
        except BaseException:
            self.generator.set_state(before)
            self.optimizer.zero_grad()
            raise
        parameters = list(self.tokens.parameters())
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= len(records)
        limit = self.config.gradient_clip or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit).item()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step_index)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._update_averages()
        self.step_index += 1
        t, value, accuracy, error = (sum(column) / len(records) for column in zip(*records, strict=True))
        return StepRecord(self.step_index, int(t), value, accuracy, error, norm)

    def finished(self, name: str, metadata: dict[str, str]) -> SoftTokens:
        """The tokens as they are now; their running average where `ema_decay` is set."""
        source = self.average if self.config.ema_decay else dict(self.tokens.named_parameters())
        copies = {key: value.detach().clone().cpu() for key, value in source.items()}
        family, blocks = self.tokens.family, self.tokens.blocks
        banks = {
            key: copies[key][0] if family.is_unet else copies[key]
            for key in ("tokens", "negative_tokens")
            if key in copies
        }
        table = copies.get("time_table")
        return SoftTokens(**banks, family=family, blocks=blocks, time_table=table, name=name, metadata=metadata)

    def _accumulate(self, micro_batch: int) -> tuple[int, float, float, float]:
        config = self.config
        latents, conds, wrong = self.next_batch(config.batch_size)
        t = draw_timestep(self.generator)
        noise = torch.randn((1, *latents.shape[1:]), generator=self.generator)
        if self.empty is not None and torch.rand((), generator=self.generator) < config.caption_dropout:
            # one at most: two equal captions in a batch would be false negatives
            dropped = int(torch.randint(len(conds), (), generator=self.generator))
            conds, wrong = list(conds), list(wrong)
            conds[dropped], wrong[dropped] = self.empty, []  # nearly right is better than nothing said
        compared = loss.comparison([len(captions) for captions in wrong])
        if config.objective == "denoising":
            compared = torch.eye(len(conds), dtype=torch.bool)
        batch = (latents, noise, [*conds, *chain(*wrong)], t, micro_batch, compared)
        value, errors = self._match_scores(batch) if config.objective == "agsm" else self._contrast(batch)
        if not torch.isfinite(value):
            raise SoftREPAError(
                f"The loss is {value.item()} at step {self.step_index + 1}, expected a number; "
                "try a lower learning_rate or a base model in another precision."
            )
        is_retrieval = config.objective == "contrastive"  # AGSM's captions are not all read with one bank
        accuracy = loss.retrieval_accuracy(errors[:, : len(errors)]) if is_retrieval else math.nan
        return t, value.item(), accuracy, errors.diagonal().mean().item()

    def objective(self, errors: Tensor, compared: Tensor | None = None) -> Tensor:
        """The loss on errors (B, J), where it is one of them alone."""
        config = self.config
        if config.objective == "denoising":
            return loss.denoising_loss(errors)
        relative, weight = config.temperature_mode == "relative", config.denoising_weight or 0.0
        return loss.contrastive_loss(
            errors, config.temperature, config.logit_scale, weight, relative, config.symmetric, compared
        )

    def _contrast(self, batch: tuple) -> tuple[Tensor, Tensor]:
        *_, t, _, compared = batch
        return backward_through_pairs(
            self.tokens.rows(t, self.pairs.embed),
            lambda rows: self.pairs.gradients(rows, *batch),
            lambda errors: self.objective(errors, compared),
            compared,
        )

    def _match_scores(self, batch: tuple) -> tuple[Tensor, Tensor]:
        config, (*_, t, _, _) = self.config, batch
        assert self.teacher is not None
        banks, teacher = (tokens.banks(t, self.pairs.embed) for tokens in (self.tokens, self.teacher))
        aims = partial(
            agsm.aims,
            temperature=config.agsm_temperature,
            positive=config.positive_guidance,
            negative=config.negative_guidance,
        )
        value, errors, gradient = self.pairs.regression(aims, banks.detach(), teacher.detach(), *batch)
        banks.backward(gradient.to(banks.device))
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
    generator = torch.Generator().manual_seed(seed)
    layers = blocks if isinstance(blocks, int) else 1
    tokens = torch.randn(layers, n_tokens, width, generator=generator) * INIT_STD
    if bos is not None:
        tokens = bos.float().expand_as(tokens).clone()
    table = torch.randn(BUCKETS, layers * width, generator=generator) * INIT_STD if has_time_table else None
    banks = [tokens]
    if two_banks:
        banks.append(tokens if bos is not None else torch.randn(tokens.shape, generator=generator) * INIT_STD)
    first, *second = (bank[0] if family.is_unet else bank for bank in banks)
    return SoftTokens(first, family, blocks, time_table=table, negative_tokens=second[0] if second else None)
