"""How many image-caption pairs run at once: as many as the memory holds, found by measuring one."""

from functools import partial

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...data.dataset import Dataset
from ...errors import SoftREPAError
from ...training.pairs import MOST_KEPT, StepBatch
from .out_of_memory import halving, is_out_of_memory
from .score_matching import regression
from .trainable import TrainableNetwork

MEMORY_SHARE = 0.8
GUESSED_SHARE = 3
"""A pair's forward and backward pass over ComfyUI's estimate of a forward pass, until one has been measured."""


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

    def regression(self, aims, banks, teacher, batch, weights, micro_batch):
        return self._fitted(partial(regression, self.network), (aims, banks, teacher), batch, (weights,), micro_batch)

    def _fitted(self, call, before, batch: StepBatch, behind, micro_batch):
        if not self.at_once:
            rows = before[-1]  # of AGSM both banks', of which a pair needs one
            self.at_once = micro_batch or self.fitting(rows if rows.ndim == 3 else rows[0], batch)
        size = max(1, min(self.at_once, batch.pairs))
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


def load(model: ModelPatcher, needed: int) -> None:
    """Brings `model` to its device, with room for `needed` bytes beside it.

    A model with LoRAs that lies there in part already stays as it is: loaded once more, ComfyUI 0.30.0 adds a LoRA to
    weights that have it.
    """
    is_there = any(one.model is model for one in memory.current_loaded_models)
    if not (is_there and model.patches and model.loaded_size() < model.model_size()):
        memory.load_models_gpu([model], memory_required=needed)


def batch_bytes(batch: StepBatch) -> int:
    """Of latents and captions, which lie in RAM."""
    captions = sum(tensor.nbytes for tensor in tree_leaves(batch.conds) if isinstance(tensor, Tensor))
    return captions + 3 * batch.latents.nbytes  # with their noised forms and targets


def memory_line(pairs: AdaptivePairs, rows: Tensor, batch: StepBatch) -> str:
    """What a step takes, on the device and in RAM."""
    kept = f"gradients of a step {kept_bytes(rows.numel(), batch.pairs) / 1e9:.2f} GB"
    pair = f"one image-caption pair {pairs.pair_bytes / 1e9:.2f} GB, " if pairs.pair_bytes else ""
    return f"memory beside the model: {pair}{kept}; in RAM a batch {batch_bytes(batch) / 1e9:.2f} GB"
