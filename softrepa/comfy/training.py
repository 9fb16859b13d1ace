"""A training run on a MODEL: checks first, then steps with progress, memory that adapts, and a file at the end."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar

from .. import checkpoint
from ..dataset import Dataset
from ..errors import SoftREPAError
from ..families import TEXT_WIDTH, Blocks, parse_blocks
from ..loss import contrastive_loss
from ..tokens import SoftTokens
from ..trainer import StepRecord, Trainer, TrainingConfig, new_tokens
from .models import ModelShape, check_fit, model_shape
from .pairs import PairNetwork
from .state import KEY

VANISHING = 1e-6
"""Below this the contrastive loss hardly depends on any error."""

MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class TokenPlan:
    """What is trained: tokens a layer, where, with or without a time table. None is the family's recipe."""

    n_tokens: int | None = None
    blocks: str | None = None
    time_table: bool | None = None

    def start(self, shape: ModelShape, seed: int, empty: dict) -> SoftTokens:
        """Fresh tokens for a model of this shape; `empty` is the cond of ""."""
        family, recipe = shape.family, shape.family.recipe
        has_table = recipe.has_time_table if self.time_table is None else self.time_table
        bos = empty["cross_attn"][0, 0].clone() if recipe.starts_from_bos else None
        count = self.n_tokens or recipe.n_tokens
        return new_tokens(family, shape.width, count, self._blocks(shape), has_table, seed, bos)

    def _blocks(self, shape: ModelShape) -> Blocks:
        if self.blocks is None:
            published = shape.family.published_blocks
            return published if shape.family.is_unet else min(shape.family.recipe.layers, shape.layers)
        blocks = parse_blocks(self.blocks, shape.family, "Training")
        if isinstance(blocks, int) and blocks > shape.layers:
            raise SoftREPAError(f"Training: blocks is {blocks}, expected at most the model's {shape.layers} layers.")
        return blocks


@dataclass
class Run:
    """What a finished or interrupted run leaves."""

    tokens: SoftTokens
    path: Path
    records: list[StepRecord] = field(default_factory=list)


class AdaptivePairs:
    """`PairNetwork` with the number of pairs at once found by measuring, and halved when memory runs out."""

    def __init__(self, network: PairNetwork, device: torch.device):
        self.network, self.device = network, device
        self.found = 0

    def embed(self, rows):
        return self.network.embed(rows)

    def gradients(self, rows, latents, noise, conds, t, micro_batch):
        """As `PairNetwork.gradients`; `micro_batch` 0 fills the memory."""
        self.found = min(self.found or micro_batch or self._measured(rows, latents, noise, conds, t), len(latents) ** 2)
        while True:
            try:
                return self.network.gradients(rows, latents, noise, conds, t, self.found)
            except torch.OutOfMemoryError:
                if self.found == 1:
                    raise
                self.found //= 2
                memory.soft_empty_cache()
                logging.warning("SoftREPA: out of memory, going on with %d pairs at once.", self.found)

    def _measured(self, rows, latents, noise, conds, t) -> int:
        if self.device.type != "cuda":
            return len(latents)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.network.gradients(rows, latents[:1], noise, conds[:1], t, 1)
        one = torch.cuda.max_memory_allocated(self.device) - before
        return max(1, int(MEMORY_SHARE * memory.get_free_memory(self.device) / max(one, 1)))


def train(
    model: ModelPatcher,
    dataset: Dataset,
    config: TrainingConfig,
    plan: TokenPlan,
    path: Path,
    init_tokens: SoftTokens | None = None,
    micro_batch: int = 0,
    checkpoint_every: int = 500,
    checkpointing: bool = True,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Run:
    """Learns tokens and writes them to `path`: every `checkpoint_every` steps, at the end, and when interrupted.

    dataset: see `softrepa.dataset`; latents are VAE latents, `process_latent_in` is done here. Raises SoftREPAError.
    """
    shape = checked_model(model)
    check_dataset(dataset, shape, model.model.latent_format.latent_channels, config)
    dataset = dataset.started(config.seed)
    patcher = model.clone(disable_dynamic=True) if model.is_dynamic() else model.clone()
    memory.load_models_gpu([patcher])
    patcher.pre_run()
    with outside_inference():
        start = init_tokens or plan.start(shape, config.seed, dataset.empty)
        check_fit(start, shape)
        network = PairNetwork(patcher, start.blocks, checkpointing)
        pairs = AdaptivePairs(network, patcher.load_device)

        def next_batch(size):
            batch = dataset.batch(size)
            memory.load_models_gpu([patcher])  # encoding on the fly may have pushed it out
            return patcher.model.process_latent_in(batch.latents.clone()), batch.conds

        trainer = Trainer(config, start, pairs, next_batch, dataset.empty)
        check_gradients(trainer, network, dataset, on_progress)
        metadata = described(model, dataset, trainer.config)
        run = Run(start, path)
        try:
            _loop(trainer, run, micro_batch, checkpoint_every, metadata, on_progress)
        finally:
            run.tokens = trainer.finished(path.stem, metadata | {"steps": str(trainer.step_index)})
            if trainer.step_index:
                checkpoint.save(run.tokens, path)
            patcher.cleanup()
    return run


def _loop(trainer: Trainer, run: Run, micro_batch, checkpoint_every, metadata, on_progress) -> None:
    bar = ProgressBar(trainer.config.steps)
    started, said = time.monotonic(), 0.0
    for step in range(1, trainer.config.steps + 1):
        memory.throw_exception_if_processing_interrupted()
        run.records.append(trainer.step(micro_batch))
        bar.update_absolute(step)
        now = time.monotonic()
        if now - said >= 1 or step == trainer.config.steps:
            said = now
            on_progress(progress_line(run.records, trainer.config.steps, now - started))
        if checkpoint_every and step % checkpoint_every == 0:
            checkpoint.save(trainer.finished(run.path.stem, metadata | {"steps": str(step)}), run.path)


def progress_line(records: list[StepRecord], steps: int, seconds: float) -> str:
    """Step, loss and in-batch retrieval over the last steps, speed and time left."""
    recent = records[-50:]
    loss = sum(record.loss for record in recent) / len(recent)
    accuracy = sum(record.accuracy for record in recent) / len(recent)
    rate = len(records) / max(seconds, 1e-9)
    left = int((steps - len(records)) / rate)
    return (
        f"step {len(records)}/{steps}, loss {loss:.4f}, retrieval {accuracy:.0%}, {rate:.2f} steps/s, "
        f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )


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


def check_dataset(dataset: Dataset, shape: ModelShape, channels: int, config: TrainingConfig) -> None:
    """Matching widths and latent channels, and enough different captions for a batch."""
    expected = shape.family.context_width or TEXT_WIDTH
    width = dataset.empty["cross_attn"].shape[-1]
    if width != expected:
        raise SoftREPAError(
            f"{dataset.label} has text of width {width}, expected {expected} for {shape.family.title}: "
            "encode it with this model's own CLIP."
        )
    example = dataset.train[0]
    found = dataset.encodings.latent(example).shape[0]
    if found != channels:
        raise SoftREPAError(
            f"{dataset.label} has latents of {found} channels, expected {channels} for {shape.family.title}: "
            "encode it with this model's own VAE."
        )
    if dataset.different_captions < config.batch_size:
        raise SoftREPAError(
            f"{dataset.label} has {dataset.different_captions} images of one size with different captions, "
            f"expected at least batch_size, {config.batch_size}."
        )


def check_gradients(trainer: Trainer, network: PairNetwork, dataset: Dataset, on_progress) -> None:
    """Every soft block must feel its tokens, and the loss the errors."""
    position = dataset.state()
    latents, conds = trainer.next_batch(trainer.config.batch_size)
    dataset.restore(position)
    noise = torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(0))
    rows = trainer.tokens.rows(500, network.embed).detach()
    errors, gradients = network.gradients(rows, latents, noise, conds, 500, 1)
    for layer, norm in enumerate(gradients.flatten(3).norm(dim=-1).amax(dim=(0, 1)).tolist()):
        if not norm > 0:
            raise SoftREPAError(
                f"Soft block {layer} gets no gradient, expected one in each: another node replaces its attention."
            )
    errors = errors.detach().requires_grad_()
    config = trainer.config
    contrast = contrastive_loss(errors, config.temperature, config.logit_scale)
    slope = torch.autograd.grad(contrast, errors)[0].abs().max().item()
    if slope < VANISHING:
        text = (
            f"The contrastive loss hardly depends on the errors (about {errors.mean().item():.2f}) at temperature "
            f"{config.temperature}: slope {slope:.0e}. Nothing will be learned from the contrast; try temperature 2."
        )
        logging.warning("SoftREPA: %s", text)
        on_progress(text)


def described(model: ModelPatcher, dataset: Dataset, config: TrainingConfig) -> dict[str, str]:
    """The metadata of a trained file."""
    return {
        "training": json.dumps(asdict(config), sort_keys=True),
        "base_model": f"{type(model.model).__name__} {weights_hash(model)}",
        "dataset": dataset.description,
        "dataset_fingerprint": dataset.fingerprint,
        "date": time.strftime("%Y-%m-%d"),
    }


def weights_hash(model: ModelPatcher) -> str:
    """Of a few values of every weight: enough to tell models apart, quick for large ones."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.model.diffusion_model.state_dict().items()):
        sample = weight.flatten()[:: max(1, weight.numel() // 16)][:16].float().cpu()
        digest.update(name.encode() + sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
