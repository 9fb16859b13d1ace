"""Gradients of pairs' errors by the soft rows, through a MODEL's own frozen network."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...data.dataset import Cond
from ...errors import SoftREPAError
from ...families import Blocks
from ...training.noising import pair_error
from ...training.pairs import Rows, StepBatch, weighted_sum
from ..models import check_plain
from ..tokens.call_state import KEY, CallState
from ..tokens.patching import compute_dtype
from .frozen import ForeignTensors, SavedBytes, differentiable_attention, frozen
from .pairs import PairNetwork


def gradient_of(values: Tensor, leaf: Tensor, scale: float) -> Tensor:
    """Each value's gradient by its own row of `leaf`; backward times `scale`, for a mean's seed underflows in fp16."""
    gradient = None
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum() * scale, leaf, allow_unused=True)
    if gradient is None:
        raise SoftREPAError(
            "Soft tokens get no gradient: another node computes the model's attention without a backward pass, "
            "expected the model from before that node."
        )
    return gradient / scale


def product(output: Tensor, pulls: Tensor) -> Tensor:
    """Whose gradient by the output are the pulls, (P, C, H, W) -> (P,)."""
    return (output.float() * pulls).flatten(1).sum(dim=1)


def with_foreign_tensors(method):
    """A function of a `TrainableNetwork`, tried again where another node's inference tensor was in autograd's way."""

    @wraps(method)
    def tried(self, *args):
        try:
            return method(self, *args)
        except RuntimeError as error:
            if not self.foreign.explain(error):
                raise
        return method(self, *args)

    return tried


class TrainableNetwork(PairNetwork):
    """A `PairNetwork` into which rows are inserted at `blocks`, and through which their gradients come back."""

    def __init__(self, model: ModelPatcher, blocks: Blocks, checkpointing: bool = True):
        check_plain(model)
        super().__init__(model)
        self.model, self.foreign = model, ForeignTensors()
        self.places = self.adapter.places(blocks)
        self.checkpointing = checkpointing

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass instead of kept."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, is_on: bool) -> None:
        self._checkpointing = is_on
        hooked = self.adapter.trainable(self.model, is_on, self.foreign).model_options["transformer_options"]
        self.options |= {key: hooked[key] for key in ("patches", "patches_replace") if key in hooked}

    def attention(self):
        return differentiable_attention(self.options, self.device, compute_dtype(self.base_model))

    @with_foreign_tensors
    def gradients(self, rows: Rows, batch: StepBatch, micro_batch: int) -> tuple[Tensor, Tensor]:
        return self._gradients(rows, batch, micro_batch)

    @with_foreign_tensors
    def gradients_and_predictions(
        self, rows: Rows, batch: StepBatch, micro_batch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        predictions = torch.empty(batch.pairs, *batch.latents.shape[1:])
        return *self._gradients(rows, batch, micro_batch, predictions), predictions

    def _gradients(
        self, rows: Rows, batch: StepBatch, micro_batch: int, predictions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fills `predictions` where they are given."""
        errors = torch.zeros(batch.compared.shape, device=self.device)
        places = torch.full(errors.shape, -1)
        places[batch.compared] = torch.arange(batch.pairs)
        gradients = torch.empty(batch.pairs, *rows.shape, device=self.device)
        with self.trainable():
            for images, texts, output, error, gradient in self._by_pair(rows, batch, micro_batch):
                errors[images, texts] = error
                gradients[places[images, texts]] = gradient
                if predictions is not None:
                    predictions[places[images, texts]] = output.float().cpu()
        return errors, gradients

    @with_foreign_tensors
    def weighted_gradient(self, rows: Rows, batch: StepBatch, weights: Tensor, micro_batch: int) -> Tensor:
        total = torch.zeros(rows.shape, dtype=torch.float64)
        with self.trainable():
            for images, texts, *_, gradient in self._by_pair(rows, batch, micro_batch):
                total += weighted_sum(weights[images, texts], gradient)
        return total

    @with_foreign_tensors
    def through_unconditional(
        self, rows: Rows, batch: StepBatch, empty: Cond, pulls: Tensor, micro_batch: int
    ) -> Tensor:
        images_alone = replace(batch.under(empty), targets=pulls)
        total = torch.zeros(rows.shape, dtype=torch.float64)
        with self.trainable():
            for images, *_, gradient in self._by_pair(rows, images_alone, micro_batch, product):
                total += weighted_sum(torch.ones(len(images)), gradient)
        return total

    @with_foreign_tensors
    def saved_bytes(self, rows: Rows, batch: StepBatch) -> int:
        """What autograd would keep of one pair until its backward pass, of the longest caption; weights aside.

        Only a forward pass runs, and it keeps nothing, so it needs no more memory than one without gradients.
        """
        sigma, seen, _, captions = self.prepared(batch)
        longest = max(range(len(captions.of)), key=lambda j: captions.of[j]["c_crossattn"].shape[1])
        network = self.base_model.diffusion_model
        saved = SavedBytes([*network.parameters(), *network.buffers()])
        with self.trainable(), saved:
            leaf = rows.to(self.device).unsqueeze(0).clone().requires_grad_()
            self.output(seen[:1], sigma, captions.joined([longest], self.device), leaf)
        return saved.bytes

    def _by_pair(
        self,
        rows: Rows,
        batch: StepBatch,
        micro_batch: int,
        measure: Callable[[Tensor, Tensor], Tensor] = pair_error,
    ):
        """Of `micro_batch` pairs at a time (image indices, caption indices, predictions, errors, gradients of these).

        measure: what an error is, of predictions and targets (P, C, H, W); its gradient is by the pair's own rows.
        """
        sigma, seen, target, captions = self.prepared(batch)
        rows = rows.to(self.device)
        for images, texts in captions.runs(micro_batch, batch.compared):
            memory.throw_exception_if_processing_interrupted()
            leaf = rows.expand(len(images), *rows.shape).clone().requires_grad_()
            output = self.output(seen[images], sigma, captions.joined(texts, self.device), leaf)
            error = measure(output, target[images].to(self.device))
            yield images, texts, output.detach(), error.detach(), gradient_of(error, leaf, target[0].numel())

    @contextmanager
    def trainable(self):
        """Within it gradients come back through the network. Nothing may be loaded or unloaded meanwhile."""
        network = self.base_model.diffusion_model
        with frozen(network), self.adapter.recomputing(network, self.checkpointing, self.foreign):
            yield

    @with_foreign_tensors
    def embed(self, rows: Tensor) -> Tensor:
        """Rows of the text's width as the network takes them, with their graph."""
        embedder = self.adapter.embedder(self.base_model.diffusion_model)
        if embedder is None:
            return rows
        with frozen(embedder), self.foreign.made_ordinary():
            return embedder(rows.to(self.device, compute_dtype(self.base_model))).float()

    def output(self, *args) -> Tensor:
        with self.foreign.made_ordinary():
            return super().output(*args)

    def inserting(self, options: dict, rows: Tensor, timestep: Tensor) -> dict:
        """`options` of one call in which P samples get `rows` (P, L, m, d)."""
        state = CallState(
            "Tokens in training",
            timestep,
            negative=[False] * len(rows),
            rows={place: rows[:, self.adapter.layer(place)] for place in self.places},
            blocks=self.adapter.blocks(self.base_model.diffusion_model),
        )
        return self.adapter.inserting(options | {KEY: state}, state)
