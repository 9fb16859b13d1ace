"""How many image-caption pairs run at once: as many as the memory holds, found by measuring one."""

import logging
import math
import time
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
RAM_SHARE = 0.4
"""Of the free RAM, where the device has no memory of its own: what is free there may be wanted by others."""
IN_RAM = ("cpu", "mps")
MOST_ON_CPU = 2**31
"""Beyond it more pairs at once are not faster there: the layers' own arithmetic fills the cores long before."""
BESIDE_SAVED = 1.25
"""The peak of a forward and backward pass over what autograd saves."""
CHECKPOINTED_SHARE = 0.25
"""Of what autograd saves, the most that is left of it with checkpointing: inputs of blocks, and one block's own."""
GUESSED_SHARE = 3
"""A pair's forward and backward pass over ComfyUI's estimate of a forward pass, until one has been measured."""


class AdaptivePairs:
    """`softrepa.training.pairs.Pairs` on a `TrainableNetwork`: how many pairs run at once is found by measuring.

    `micro_batch` 0 fills the memory. The number is halved when memory runs out.

    `is_auto`: activations are kept wherever one pair fits with them, and computed again where none does. Keeping them
    is the faster: that spares a second forward pass, while more pairs at once bring little where a pair is so large
    that few fit. Where each of several runs of pairs fetches offloaded weights it may not be, and a step is timed both
    ways. Where it was too much after all, the run goes on with checkpointing. Neither changes the result.
    """

    def __init__(self, network: TrainableNetwork, is_auto: bool = False):
        self.network, self.is_auto = network, is_auto
        self.is_decided = not is_auto
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

    def gradients_and_predictions(self, rows, batch, micro_batch):
        return self._fitted(self.network.gradients_and_predictions, (rows,), batch, (), micro_batch)

    def unconditional(self, rows, batch, empty, micro_batch):
        return self._fitted(self.network.unconditional, (rows,), batch, (empty,), micro_batch)

    def through_unconditional(self, rows, batch, empty, pulls, micro_batch):
        return self._fitted(self.network.through_unconditional, (rows,), batch, (empty, pulls), micro_batch)

    def regression(self, aims, banks, teacher, batch, weights, micro_batch):
        return self._fitted(partial(regression, self.network), (aims, banks, teacher), batch, (weights,), micro_batch)

    def guided(self, rows, batch, empty, scale, micro_batch):
        return self._fitted(self.network.guided, (rows,), batch, (empty, scale), micro_batch)

    def _fitted(self, call, before, batch: StepBatch, behind, micro_batch):
        rows = before[-1] if before[-1].ndim == 3 else before[-1][0]  # of AGSM both banks', of which a pair needs one
        if not self.at_once:
            self._decide(rows, batch)
            self.at_once = micro_batch or self.fitting(rows, batch)
            if self.is_auto and not micro_batch and self._fetches_often(batch):
                self._decide_by_time(rows, batch)
        size = max(1, min(self.at_once, batch.pairs))
        try:
            found, fitted = halving(lambda size: call(*before, batch, *behind, size), size)
        except RuntimeError as error:
            if not self._can_do_with_less(error):
                raise
            return self._fitted(call, before, batch, behind, micro_batch)
        if fitted < size:
            self.at_once = fitted
        return found

    def one_by_one(self, rows, batch: StepBatch):
        """As `gradients`, a pair at a time; measures what a pair takes. Raises SoftREPAError where none fits."""
        self._decide(rows, batch)
        device = self.network.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        try:
            found = self.network.gradients(rows, batch, 1)
        except RuntimeError as error:
            if self._can_do_with_less(error):
                return self.one_by_one(rows, batch)
            if not is_out_of_memory(error):
                raise
            height, width = (8 * side for side in batch.latents.shape[-2:])
            advice = "" if self.network.checkpointing else "turn checkpointing on or "
            raise SoftREPAError(
                f"{memory.get_free_memory(device) / 1e9:.1f} GB of memory are free, expected enough for one "
                f"image-caption pair of {width} x {height}: {advice}lower the dataset's resolution."
            ) from None
        if device.type == "cuda":
            self.pair_bytes = torch.cuda.max_memory_allocated(device) - before
        return found

    def fitting(self, rows, batch: StepBatch) -> int:
        """How many pairs fill the memory that they may have."""
        if not self.pair_bytes:
            if self.network.device.type == "cuda":
                self.one_by_one(rows, first_pairs(batch, 1))
            else:  # PyTorch keeps no account of a peak
                self.pair_bytes = self._counted(rows, batch)
        room = self._room(rows, batch)
        if self.network.device.type == "cpu":
            room = min(room, MOST_ON_CPU)
        return max(1, int(room / max(self.pair_bytes, 1)))

    def _decide(self, rows, batch: StepBatch) -> None:
        """Whether activations are kept, before any pair has run."""
        if self.is_decided:
            return
        self.is_decided, self.network.checkpointing = True, False
        counted, room = self._counted(rows, batch), self._room(rows, batch)
        self.network.checkpointing = counted > room
        said = "computed again (checkpointing)" if counted > room else "kept (no checkpointing)"
        logging.info(
            "SoftREPA: activations are %s: those of a pair take %.2f GB of %.2f GB.", said, counted / 1e9, room / 1e9
        )

    def _fetches_often(self, batch: StepBatch) -> bool:
        """Whether several runs of pairs fetch offloaded weights each; with checkpointing there may be fewer."""
        if self.network.checkpointing or self.at_once >= batch.pairs:
            return False
        weights = self.network.base_model.diffusion_model.parameters()
        return any(weight.device.type != self.network.device.type for weight in weights)

    def _decide_by_time(self, rows, batch: StepBatch) -> None:
        """Whether activations are kept: computes a part of the batch both ways and keeps the faster."""
        part = batch.parts(MOST_KEPT // (4 * rows.numel()))[0]
        ways = []
        for is_on in (False, True):
            self.network.checkpointing, self.pair_bytes = is_on, 0
            try:
                self.network.gradients(rows, first_pairs(batch, 1), 1)  # whatever runs first is slower
                size = min(self.fitting(rows, part), part.pairs)
                seconds, size = halving(partial(self._seconds, rows, part), size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                memory.soft_empty_cache()
                seconds, size = math.inf, 1
            ways.append((seconds, self.network.checkpointing, size, self.pair_bytes))
        logging.info(
            "SoftREPA: each run of pairs fetches weights: a step takes %.2f s with activations kept, %.2f s with "
            "checkpointing; going on with the faster.",
            *(seconds for seconds, *_ in ways),
        )
        _, self.network.checkpointing, self.at_once, self.pair_bytes = min(ways)

    def _seconds(self, rows, batch: StepBatch, size: int) -> float:
        """What `gradients` of `size` pairs at once takes."""
        start = time.perf_counter()
        self.network.gradients(rows, batch, size)[1].cpu()  # waits for the device
        return time.perf_counter() - start

    def _can_do_with_less(self, error: RuntimeError) -> bool:
        """Whether memory ran out that checkpointing would need less of; it is turned on then."""
        if not self.is_auto or self.network.checkpointing or not is_out_of_memory(error):
            return False
        self.network.checkpointing, self.at_once, self.pair_bytes = True, 0, 0
        memory.soft_empty_cache()
        logging.warning("SoftREPA: out of memory for one pair, going on with checkpointing.")
        return True

    def _counted(self, rows, batch: StepBatch) -> int:
        """Of a pair, by what autograd saves of it."""
        is_on = self.network.checkpointing
        try:
            self.network.checkpointing = False
            saved = self.network.saved_bytes(rows, batch)
        finally:
            self.network.checkpointing = is_on
        return int(saved * (CHECKPOINTED_SHARE if is_on else BESIDE_SAVED))

    def _room(self, rows, batch: StepBatch) -> int:
        """Bytes that pairs may take beside the weights."""
        share = RAM_SHARE if self.network.device.type in IN_RAM else MEMORY_SHARE
        return int(share * memory.get_free_memory(self.network.device)) - kept_bytes(rows.numel(), batch.pairs)

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
        with torch.inference_mode():  # as ComfyUI's nodes do: outside of it weights become what no mode takes
            memory.load_models_gpu([model], memory_required=needed)


def batch_bytes(batch: StepBatch) -> int:
    """Of latents and captions, which lie in RAM."""
    captions = sum(tensor.nbytes for tensor in tree_leaves(batch.conds) if isinstance(tensor, Tensor))
    return captions + 3 * batch.latents.nbytes  # with their noised forms and targets


def memory_line(pairs: AdaptivePairs, rows: Tensor, batch: StepBatch) -> str:
    """What a step takes, on the device and in RAM."""
    kept = f"gradients of a step {kept_bytes(rows.numel(), batch.pairs) / 1e9:.2f} GB"
    pair = f"one image-caption pair {pairs.pair_bytes / 1e9:.2f} GB, " if pairs.pair_bytes else ""
    found = f"memory beside the model: {pair}{kept}; in RAM a batch {batch_bytes(batch) / 1e9:.2f} GB"
    is_on = pairs.network.checkpointing
    return f"{found}; checkpointing {'on' if is_on else 'off'}, as memory allows" if pairs.is_auto else found
