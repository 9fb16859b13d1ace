"""How well a MODEL tells captions apart: retrieval, contrastive loss and information, on noise that never changes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...data.dataset import Batch, Dataset
from ...errors import SoftREPAError
from ...training import loss
from ...training.pairs import StepBatch
from ...training.ranks import ALONE, Ranks
from ...training.timesteps import SCORED, parse_timesteps
from ..data.checks import check_encodings
from .memory_use import load
from .out_of_memory import halving
from .pairs import PairNetwork

TIMESTEPS = parse_timesteps(SCORED)


@dataclass(frozen=True)
class Score:
    """T timesteps by N images: `retrieved`, contrastive `losses` and `information` in nats, (T, N) each.

    `captions` (N,) says among how many each image had to find its own.

    Two scores of the same batches, timesteps and seed are of the same noise, so they compare image by image.
    """

    timesteps: tuple[int, ...]
    captions: Tensor
    retrieved: Tensor
    losses: Tensor
    information: Tensor

    @property
    def accuracy(self) -> float:
        return self.retrieved.float().mean().item()

    @property
    def chance(self) -> float:
        return (1 / self.captions).mean().item()

    @property
    def loss(self) -> float:
        return self.losses.mean().item()


class HeldOut:
    """Batches to measure on, the same each time they are gone through, encoded as they are needed.

    At most `batches` of the validation images or, where there are none, of all images, each once. Raises SoftREPAError
    where the validation images have no two of one size.
    """

    def __init__(self, dataset: Dataset, batch_size: int, batches: int, seed: int):
        for name, value, least in (("batch_size", batch_size, 2), ("batches", batches, 1)):
            if value < least:
                raise SoftREPAError(f"{name} is {value}, expected {least} or more.")
        self.dataset, self.seed = dataset, seed
        self.batch_size = batch_size if dataset.validation else min(batch_size, dataset.different_captions)
        self.batches = batches if dataset.validation else min(batches, max(1, len(dataset) // self.batch_size))
        if next(iter(self), None) is None:
            raise SoftREPAError(
                f"{dataset.label} has {len(dataset.validation)} validation images and no two of one size with "
                "different captions, expected at least two: raise validation_percent."
            )

    def __iter__(self) -> Iterator[Batch]:
        if self.dataset.validation:
            return self.dataset.validation_batches(self.batch_size, self.batches)
        return self.dataset.started(self.seed).one_epoch(self.batch_size, self.batches)

    def __len__(self) -> int:
        """At most."""
        return self.batches


def score(
    model: ModelPatcher,
    batches: HeldOut | Sequence[Batch],
    timesteps: tuple[int, ...] = TIMESTEPS,
    seed: int = 0,
    temperature: float = loss.TEMPERATURE,
    logit_scale: float = loss.LOGIT_SCALE,
    micro_batch: int = 0,
    tick: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> Score:
    """Of a MODEL as it is, with the tokens that it carries. Latents of the batches are the VAE's own.

    `micro_batch` pairs run at once; 0 is one caption's. The result does not depend on it, nor on how many processes,
    `ranks`, divide the pairs. `tick` is told how far it is.
    Raises SoftREPAError for a dataset that another model encoded.
    """
    if isinstance(batches, HeldOut):
        check_encodings(batches.dataset, model)
    patcher = model.clone()
    columns: dict[str, list[Tensor]] = {"retrieved": [], "losses": [], "information": []}
    captions: list[int] = []
    done, total = 0, len(batches) * len(timesteps)
    with torch.inference_mode(False), torch.no_grad():
        network = PairNetwork(patcher)
        for index, batch in enumerate(batches):
            latents = network.base_model.process_latent_in(batch.latents.clone())
            captions += [len(latents)] * len(latents)
            # for every batch: encoding on the fly may have pushed it out
            load(patcher, int(patcher.model.memory_required([micro_batch or len(latents), *latents.shape[1:]])))
            column: dict[str, list[Tensor]] = {name: [] for name in columns}
            for t in timesteps:
                memory.throw_exception_if_processing_interrupted()
                step = StepBatch.of_all(latents, _noise(latents, seed, index, t), batch.conds, t)
                size = micro_batch or len(latents)
                own = step.only(ranks.pairs(step.compared))
                errors, fitted = halving(partial(network.errors, None, own), size)
                micro_batch = micro_batch if fitted == size else fitted
                errors = ranks.summed(errors)
                column["retrieved"].append(loss.retrieved(errors))
                column["losses"].append(loss.contrast(errors, temperature, logit_scale))
                column["information"].append(loss.information(errors, latents[0].numel()))
                done += 1
                tick(done, total)
            for name, rows in column.items():
                columns[name].append(torch.stack(rows))
    return Score(
        tuple(timesteps), torch.tensor(captions), **{name: torch.cat(parts, dim=1) for name, parts in columns.items()}
    )


def _noise(latents: Tensor, seed: int, batch: int, t: int) -> Tensor:
    """One noise for a batch at a timestep, the same whatever else is scored."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + batch) * 1000 + t) % 2**63)
    return torch.randn((1, *latents.shape[1:]), generator=generator)
