"""How well a MODEL tells captions apart: retrieval, contrastive loss and information, on noise that never changes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .. import loss
from ..dataset import Batch, Dataset
from ..errors import SoftREPAError
from .pairs import PairNetwork

TIMESTEPS = (100, 300, 500, 700, 900)


@dataclass(frozen=True)
class Score:
    """T timesteps by N images: `retrieved`, contrastive `losses` and `information` in nats, (T, N) each.

    Two scores of the same batches, timesteps and seed are of the same noise, so they compare image by image.
    """

    timesteps: tuple[int, ...]
    retrieved: Tensor
    losses: Tensor
    information: Tensor

    @property
    def accuracy(self) -> float:
        return self.retrieved.float().mean().item()

    @property
    def loss(self) -> float:
        return self.losses.mean().item()


def held_out(dataset: Dataset, batch_size: int, batches: int, seed: int) -> list[Batch]:
    """At most `batches` batches of the validation images, or, where there are none, drawn from all images.

    Raises SoftREPAError where the validation images have no two of one size.
    """
    if dataset.validation:
        found = list(islice(dataset.validation_batches(batch_size), batches))
        if not found:
            raise SoftREPAError(
                f"{dataset.label} has {len(dataset.validation)} validation images and no two of one size with "
                "different captions, expected at least two: raise validation_percent."
            )
        return found
    view = dataset.started(seed)
    return [view.batch(min(batch_size, dataset.different_captions)) for _ in range(batches)]


def score(
    model: ModelPatcher,
    batches: Iterable[Batch],
    timesteps: tuple[int, ...] = TIMESTEPS,
    seed: int = 0,
    temperature: float = loss.TEMPERATURE,
    logit_scale: float = loss.LOGIT_SCALE,
    micro_batch: int = 0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Of a MODEL as it is, with the tokens that it carries. Latents of the batches are the VAE's own.

    `micro_batch` pairs run at once; 0 is one caption's. The result does not depend on it. `tick` is told how far it is.
    """
    batches = list(batches)
    patcher = model.clone()
    memory.load_models_gpu([patcher])
    columns = {"retrieved": [], "losses": [], "information": []}
    done, total = 0, len(batches) * len(timesteps)
    with torch.inference_mode(False), torch.no_grad():
        network = PairNetwork(patcher)
        for index, batch in enumerate(batches):
            latents = network.base_model.process_latent_in(batch.latents.clone())
            column = {name: [] for name in columns}
            for t in timesteps:
                memory.throw_exception_if_processing_interrupted()
                noise, size = _noise(latents, seed, index, t), micro_batch or len(latents)
                errors = network.errors(latents, noise, batch.conds, t, size).cpu()
                column["retrieved"].append(loss.retrieved(errors))
                column["losses"].append(loss.contrast(errors, temperature, logit_scale))
                column["information"].append(loss.information(errors, latents[0].numel()))
                done += 1
                tick(done, total)
            for name, rows in column.items():
                columns[name].append(torch.stack(rows))
    return Score(tuple(timesteps), **{name: torch.cat(parts, dim=1) for name, parts in columns.items()})


def _noise(latents: Tensor, seed: int, batch: int, t: int) -> Tensor:
    """One noise for a batch at a timestep, the same whatever else is scored."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + batch) * 1000 + t)
    return torch.randn((1, *latents.shape[1:]), generator=generator)


def parse_timesteps(text: str) -> tuple[int, ...]:
    """ "100,300" -> (100, 300); different ones, in order. Raises SoftREPAError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) <= 999 for part in parts):
        raise SoftREPAError(f'timesteps is "{text}", expected numbers from 0 to 999 with commas between them.')
    return tuple(sorted({int(part) for part in parts}))
