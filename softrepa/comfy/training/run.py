"""A training run on a MODEL: checks first, then steps with progress, memory that adapts, and a file at the end."""

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...data.dataset import Cond, Dataset
from ...errors import SoftREPAError
from ...families import Blocks, depth, format_blocks, parse_blocks
from ...tokens import SoftTokens
from ...training import state as training_state
from ...training.config import TrainingConfig
from ...training.loss import denoising_loss
from ...training.pairs import MOST_KEPT, StepBatch
from ...training.trainer import StepRecord, Trainer, new_tokens
from ..data.checks import check_encodings
from ..families import ModelShape, model_shape
from ..models import check_fit
from ..tokens.state import KEY
from .identity import base_model, description, identity
from .out_of_memory import halving, is_out_of_memory
from .score_matching import regression
from .session import Files, Report, Session
from .trainable import TrainableNetwork

VANISHING = 1e-4
"""Below this the contrastive loss hardly depends on any error; at temperature 0.07 that is an error of about 1."""

MEMORY_SHARE = 0.8
GUESSED_SHARE = 3
"""A pair's forward and backward pass over ComfyUI's estimate of a forward pass, until one has been measured."""


@dataclass(frozen=True)
class TokenPlan:
    """What is trained: tokens a layer, where, with or without a time table. None is the family's recipe."""

    n_tokens: int | None = None
    blocks: str | None = None
    time_table: bool | None = None
    two_banks: bool = False

    def start(self, shape: ModelShape, seed: int, empty: Cond) -> SoftTokens:
        """Fresh tokens for a model of this shape; `empty` is the cond of ""."""
        family, recipe = shape.family, shape.family.recipe
        has_table = recipe.has_time_table if self.time_table is None else self.time_table
        bos = empty["cross_attn"][0, 0].clone() if recipe.starts_from_bos else None
        count = self.n_tokens or recipe.n_tokens
        return new_tokens(family, shape.width, count, self._blocks(shape), has_table, seed, bos, self.two_banks)

    def checked(self, tokens: SoftTokens) -> SoftTokens:
        """`tokens` to go on from. Raises SoftREPAError where they are not what is asked for."""
        if tokens.negative_tokens is not None and not self.two_banks:
            raise SoftREPAError(f"{tokens.label} have a second bank, expected one: training would leave it behind.")
        if tokens.negative_tokens is None and self.two_banks:
            tokens = replace(tokens, negative_tokens=tokens.tokens)
        has_table = tokens.time_table is not None
        blocks = format_blocks(tokens.blocks)
        wanted = self.blocks and format_blocks(parse_blocks(self.blocks, tokens.family, "Training"))
        for name, asked, found in (
            ("n_tokens", self.n_tokens, tokens.count),
            ("blocks", wanted, blocks),
            ("time_table", self.time_table, has_table),
        ):
            if asked is not None and asked != found:
                raise SoftREPAError(f"{name} is {asked}, expected {found} as in init_tokens, or its default.")
        return tokens

    def _blocks(self, shape: ModelShape) -> Blocks:
        if self.blocks is None:
            return shape.family.usual_blocks(shape.layers)
        blocks = parse_blocks(self.blocks, shape.family, "Training")
        if depth(blocks) > shape.layers:
            raise SoftREPAError(f"Training: blocks is {blocks}, expected at most the model's {shape.layers} layers.")
        return blocks


@dataclass(frozen=True)
class Run:
    """What a finished run gives."""

    tokens: SoftTokens
    path: Path
    records: list[StepRecord]


class AdaptivePairs:
    """`softrepa.training.pairs.Pairs` on a `TrainableNetwork`: how many pairs run at once is found by measuring.

    `micro_batch` 0 fills the memory. The number is halved when memory runs out.
    """

    def __init__(self, network: TrainableNetwork):
        self.network = network
        self.at_once = 0
        self.pair_bytes = 0

    def embed(self, rows):
        return self.network.embed(rows)

    def errors(self, rows, batch, micro_batch):
        return self._fitted(self.network.errors, (rows,), batch, (), micro_batch)

    def gradients(self, rows, batch, micro_batch):
        return self._fitted(self.network.gradients, (rows,), batch, (), micro_batch)

    def weighted_gradient(self, rows, batch, weights, micro_batch):
        return self._fitted(self.network.weighted_gradient, (rows,), batch, (weights,), micro_batch)

    def regression(self, aims, banks, teacher, batch, micro_batch):
        return self._fitted(partial(regression, self.network), (aims, banks, teacher), batch, (), micro_batch)

    def _fitted(self, call, before, batch: StepBatch, behind, micro_batch):
        if not self.at_once:
            rows = before[-1]  # of AGSM both banks', of which a pair needs one
            self.at_once = micro_batch or self.fitting(rows if rows.ndim == 3 else rows[0], batch)
        size = min(self.at_once, batch.pairs)
        found, fitted = halving(lambda size: call(*before, batch, *behind, size), size)
        if fitted < size:
            self.at_once = fitted
        return found

    def one_by_one(self, rows, batch: StepBatch):
        """As `gradients`, a pair at a time; measures what a pair takes. Raises SoftREPAError where none fits."""
        device = self.network.device
        measures = device.type == "cuda"  # elsewhere PyTorch keeps no account of a peak
        if measures:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        try:
            found = self.network.gradients(rows, batch, 1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            height, width = (8 * side for side in batch.latents.shape[-2:])
            raise SoftREPAError(
                f"{memory.get_free_memory(device) / 1e9:.1f} GB of memory are free, expected enough for one "
                f"image-caption pair of {width} x {height}: turn checkpointing on or lower the dataset's resolution."
            ) from None
        if measures:
            self.pair_bytes = torch.cuda.max_memory_allocated(device) - before
        return found

    def fitting(self, rows, batch: StepBatch) -> int:
        """How many pairs fill the memory; one caption's where that cannot be measured."""
        device = self.network.device
        if device.type != "cuda":
            return len(batch.latents)
        if not self.pair_bytes:
            self.one_by_one(rows, first_pairs(batch, 1))
        free = MEMORY_SHARE * memory.get_free_memory(device) - kept_bytes(rows.numel(), batch.pairs)
        return max(1, int(free / max(self.pair_bytes, 1)))

    def needed_bytes(self, shape: tuple[int, int, int]) -> int:
        """Of the device beside the weights for one pair of latents (C, H, W), as measured or else guessed."""
        return self.pair_bytes or int(GUESSED_SHARE * self.network.base_model.memory_required([1, *shape]))


def first_pairs(batch: StepBatch, count: int) -> StepBatch:
    """The first `count` images, each with the first `count` captions."""
    return StepBatch.of_all(batch.latents[:count], batch.noise, batch.conds[:count], batch.t)


def largest_latent(dataset: Dataset, model: ModelPatcher) -> tuple[int, int, int]:
    """(C, H, W) of the largest training size."""
    width, height = max((one.size for one in dataset.train), key=lambda size: size[0] * size[1])
    return model.model.latent_format.latent_channels, height // 8, width // 8


def kept_bytes(numbers: int, pairs: int) -> int:
    """Of the pairs' gradients, `numbers` each, that lie on the device at a time."""
    return min(MOST_KEPT, 4 * numbers * pairs)


def batch_bytes(batch: StepBatch) -> int:
    """Of latents and captions, which lie in RAM."""
    captions = sum(tensor.nbytes for cond in batch.conds for tensor in cond.values() if isinstance(tensor, Tensor))
    return captions + 3 * batch.latents.nbytes  # with their noised forms and targets


def memory_line(pairs: AdaptivePairs, rows: Tensor, batch: StepBatch) -> str:
    """What a step takes, on the device and in RAM."""
    kept = f"gradients of a step {kept_bytes(rows.numel(), batch.pairs) / 1e9:.2f} GB"
    pair = f"one image-caption pair {pairs.pair_bytes / 1e9:.2f} GB, " if pairs.pair_bytes else ""
    return f"memory beside the model: {pair}{kept}; in RAM a batch {batch_bytes(batch) / 1e9:.2f} GB"


def train(
    model: ModelPatcher,
    dataset: Dataset,
    config: TrainingConfig,
    plan: TokenPlan,
    files: Files,
    resume: Sequence[Files] = (),
    init_tokens: SoftTokens | None = None,
    micro_batch: int = 0,
    checkpointing: bool = True,
    reports: Callable[[Files], Sequence[Report]] = lambda files: (),
    metadata: dict[str, str] | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Run:
    """Learns tokens and writes them: every `files.every` steps, at the end, and when interrupted.

    dataset: see `softrepa.data.dataset`; latents are VAE latents, `process_latent_in` is done here. Where there
    are runs in `resume`, newest first, it goes on with the first of the same configuration, and `files` are not used.
    `metadata` is added to what the token file says of the run. Raises SoftREPAError.
    """
    shape = checked_model(model)
    check_dataset(dataset, model, config)
    dataset = dataset.started(config.seed)
    if config.hard_negatives:
        prepared = dataset.prepare_hard_negatives()
        logging.info("SoftREPA: %s", prepared)
        on_progress(prepared)
    patcher = static_clone(model)
    with outside_inference(), cleaned_up(patcher):
        start = plan.start(shape, config.seed, dataset.empty) if init_tokens is None else plan.checked(init_tokens)
        check_fit(start, shape)
        pairs = AdaptivePairs(TrainableNetwork(patcher, start.blocks, checkpointing))
        most_pairs = config.batch_size * (config.batch_size + config.hard_negatives)
        kept = kept_bytes(start.layers * start.count * shape.width, most_pairs)

        def load():
            needed = kept + pairs.needed_bytes(largest_latent(dataset, patcher))
            memory.load_models_gpu([patcher], memory_required=needed)

        load()
        patcher.pre_run()

        def next_batch(size):
            batch = dataset.batch(size, config.hard_negatives)
            load()  # encoding on the fly may have pushed it out
            return patcher.model.process_latent_in(batch.latents.clone()), batch.conds, batch.wrong

        trainer = Trainer(config, start, pairs, next_batch, dataset.empty)
        trained_on = base_model(model)
        described = description(trained_on, dataset, trainer.config) | (metadata or {})
        settings = identity(trainer.config, start, init_tokens is not None, trained_on, dataset)
        saved = None
        if resume:
            files, saved = same_run(resume, settings)
        session = Session(trainer, dataset, patcher, files, settings, described, on_progress)
        if saved is not None:
            session.go_on_from(saved)
        watching = reports(files)
        try:
            check_gradients(trainer, pairs, dataset, session.notice)
            session.run(micro_batch, watching)
        finally:
            session.finish(watching)
    return Run(session.tokens(), files.tokens, session.records)


def same_run(candidates: Sequence[Files], settings: dict) -> tuple[Files, training_state.TrainingState]:
    """The newest of `candidates` with these settings. Raises SoftREPAError, naming what makes the newest another."""
    newest: list[str] = []
    for files in candidates:
        saved = training_state.load(files.checkpoint)
        changes = training_state.differences(saved.identity, settings)
        if not changes:
            return files, saved
        newest = newest or changes
    raise SoftREPAError(
        f"resume: {candidates[0].checkpoint.name} is of another run ({'; '.join(newest)}), "
        "expected the same settings, or resume off."
    )


def static_clone(model: ModelPatcher) -> ModelPatcher:
    """A clone whose weights stay where they are loaded, as autograd needs. Raises SoftREPAError where there is none."""
    is_dynamic = getattr(model, "is_dynamic", None)  # older versions know no other patcher
    if is_dynamic is None or not is_dynamic():
        return model.clone()
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise SoftREPAError(
            f"Model cannot be loaded without dynamic memory ({error}), expected one of ComfyUI's own loaders, or "
            "ComfyUI started with --disable-dynamic-vram."
        ) from None


@contextmanager
def cleaned_up(patcher: ModelPatcher):
    """Nothing of a run stays on the model that others share, however it ends."""
    try:
        yield
    finally:
        patcher.cleanup()


@contextmanager
def outside_inference():
    """Nodes run in inference mode; autograd does not."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def checked_model(model: ModelPatcher) -> ModelShape:
    shape = model_shape(model)
    if model.get_attachment(KEY) is not None:
        raise SoftREPAError("Model has soft tokens on it, expected the plain model; go on with init_tokens.")
    return shape


def check_dataset(dataset: Dataset, model: ModelPatcher, config: TrainingConfig) -> None:
    """Encodings of this model, and enough different captions for a batch."""
    check_encodings(dataset, model)
    if dataset.different_captions < config.batch_size:
        raise SoftREPAError(
            f"{dataset.label} has {dataset.different_captions} images of one size with different captions, "
            f"expected at least batch_size, {config.batch_size}."
        )


def check_gradients(
    trainer: Trainer, pairs: AdaptivePairs, dataset: Dataset, notice: Callable[[str, str], None]
) -> None:
    """On two images and captions: a pair fits, every soft block feels its tokens, and the loss the errors."""
    position = dataset.state()  # what the run draws must not depend on this
    latents, conds, wrong = trainer.next_batch(trainer.config.batch_size)
    dataset.restore(position)
    noise = torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(0))
    rows = trainer.tokens.rows(500, pairs.embed).detach()
    whole = StepBatch.of_all(latents, noise, [*conds, *chain(*wrong)], 500)
    errors, gradients = pairs.one_by_one(rows, first_pairs(whole, 2))
    notice("memory", memory_line(pairs, rows, whole))
    for layer, norm in enumerate(gradients.flatten(2).norm(dim=-1).amax(dim=0).tolist()):
        if not norm > 0:
            raise SoftREPAError(
                f"Soft block {layer} gets no gradient, expected one in each: another node replaces its attention."
            )
    config = trainer.config
    if config.objective != "contrastive":
        return
    errors = errors.detach().requires_grad_()
    contrast = trainer.objective(errors) - (config.denoising_weight or 0.0) * denoising_loss(errors)
    slope = torch.autograd.grad(contrast, errors)[0].abs().max().item()
    if slope < VANISHING:
        text = (
            f"The contrastive loss hardly depends on the errors (about {errors.mean().item():.2f}) at temperature "
            f"{config.temperature}: slope {slope:.0e}. Nothing will be learned from the contrast; try temperature_mode "
            "relative with temperature 1."
        )
        logging.warning("SoftREPA: %s", text)
        notice("contrast", text)
