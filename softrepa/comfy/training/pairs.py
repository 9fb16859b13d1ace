"""Denoising errors of image-caption pairs by a MODEL's own network, and their gradients by the soft rows."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar

import comfy.model_management as memory
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, copy_nested_dicts, get_all_wrappers, merge_nested_dicts
from torch import Tensor

from ...data.dataset import Cond
from ...errors import SoftREPAError
from ...families import Blocks
from ...tokens import SoftTokens
from ...training.noising import noised_eps, noised_flow, pair_error
from ...training.pairs import Rows, StepBatch
from ..families import adapter_of, model_shape
from ..tokens.attention import OVERRIDE
from ..tokens.patching import apply_tokens, compute_dtype
from ..tokens.state import KEY, CallState
from .frozen import ForeignTensors, differentiable_attention, frozen, ordinary

Found = TypeVar("Found")
NOISING = {ModelType.FLOW: noised_flow, ModelType.EPS: noised_eps}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of CUDA also where it comes late, from work that runs by itself, and of MPS, which has no exception for it."""
    by_core = getattr(memory, "is_oom", lambda error: isinstance(error, torch.OutOfMemoryError))
    found = by_core(error) or "out of memory" in str(error).lower()
    if found and hasattr(memory, "discard_cuda_async_error"):
        memory.discard_cuda_async_error()  # or the next call would raise it again
    return found


def halving(call: Callable[[int], Found], size: int) -> tuple[Found, int]:
    """`call(size)`, `size` pairs at once, halved while memory runs out; what it found and the size that fitted."""
    while True:
        try:
            return call(size), size
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        size //= 2
        memory.soft_empty_cache()
        logging.warning("SoftREPA: out of memory, going on with %d pairs at once.", size)


def pair_errors(
    model: ModelPatcher,
    tokens: SoftTokens | None,
    latents: Tensor,
    noise: Tensor,
    conds: list[Cond],
    t: int,
    micro_batch: int,
) -> Tensor:
    """e_ij of image i under caption j, (B images, B captions) float32, with `tokens` on the model where given.

    latents: (B, C, H, W) as the network sees them (after `process_latent_in`); noise: (1, C, H, W) for the whole batch;
    conds: B dicts with cross_attn (1, N, d) and what else the text encoder gave; t: 0..999.
    The model must be loaded. No gradient.
    """
    model = model if tokens is None else apply_tokens(model, tokens)
    with torch.inference_mode(False), torch.no_grad():
        return PairNetwork(model).errors(None, StepBatch.of_all(latents, noise, conds, t), micro_batch)


@dataclass(frozen=True)
class Captions:
    """Each caption as keyword tensors of the network, (1, ...) each, wherever they lie."""

    of: list[dict[str, Tensor]]

    def joined(self, indices: list[int], device: torch.device) -> dict[str, Tensor]:
        return {key: torch.cat([self.of[j][key] for j in indices]).to(device) for key in self.of[0]}

    def runs(self, micro_batch: int, compared: Tensor) -> Iterator[tuple[list[int], list[int]]]:
        """The pairs of `compared` (B, J) as (image indices, caption indices).

        At most `micro_batch` at a time, of one text length each.
        """
        lengths: dict[torch.Size, list[int]] = {}
        for j, caption in enumerate(self.of):
            lengths.setdefault(caption["c_crossattn"].shape, []).append(j)
        for captions in lengths.values():
            pairs = [(i, j) for j in captions for i in compared[:, j].nonzero().flatten().tolist()]
            for start in range(0, len(pairs), micro_batch):
                run = pairs[start : start + micro_batch]
                yield [i for i, _ in run], [j for _, j in run]


def gradient_of(values: Tensor, leaf: Tensor, scale: float) -> Tensor:
    """Each value's gradient by its own row of `leaf`; backward times `scale`, for a mean's seed underflows in fp16."""
    (gradient,) = torch.autograd.grad(values.sum() * scale, leaf)
    return gradient / scale


def with_foreign_tensors(method):
    """What begins with a `PairNetwork`, tried again where another node's inference tensor was in autograd's way."""

    @wraps(method)
    def tried(self, *args):
        try:
            return method(self, *args)
        except RuntimeError as error:
            if not self.foreign.explain(error):
                raise
        return method(self, *args)

    return tried


class PairNetwork:
    """The network of a loaded MODEL on pairs, through the model's own patches and wrappers.

    With `trained_blocks` the rows given to its methods are inserted there; without, rows are None.
    """

    def __init__(self, model: ModelPatcher, trained_blocks: Blocks | None = None, checkpointing: bool = True):
        self.adapter = adapter_of(model_shape(model).family)
        self.base_model = model.model
        self.device = model.load_device
        """Where the network computes, whatever part of it is offloaded."""
        self.foreign = ForeignTensors()
        if self.base_model.model_type not in NOISING:
            raise SoftREPAError(f"Model predicts {self.base_model.model_type.name}, expected EPS or FLOW.")
        if trained_blocks is not None:
            if model.get_attachment(KEY) is not None:
                raise SoftREPAError("Model has soft tokens on it, expected the plain model; go on with init_tokens.")
            model = self.adapter.trainable(model, checkpointing, self.foreign)
        self.places = () if trained_blocks is None else self.adapter.places(trained_blocks)
        self.checkpointing = checkpointing
        self.options = copy_nested_dicts(model.model_options["transformer_options"])
        merge_nested_dicts(self.options.setdefault("wrappers", {}), model.wrappers, copy_dict1=False)
        self.options[OVERRIDE] = differentiable_attention(self.options, self.device, compute_dtype(self.base_model))

    def errors(self, rows: Rows | None, batch: StepBatch, micro_batch: int) -> Tensor:
        sigma, seen, target, captions = self.prepared(batch)
        errors = torch.zeros(batch.compared.shape, device=self.device)
        with torch.no_grad():
            for images, texts in captions.runs(micro_batch, batch.compared):
                memory.throw_exception_if_processing_interrupted()
                own = None if rows is None else rows.to(self.device).expand(len(images), *rows.shape)
                output = self.output(seen[images], sigma, captions.joined(texts, self.device), own)
                errors[images, texts] = pair_error(output, target[images].to(self.device))
        return errors

    @with_foreign_tensors
    def gradients(self, rows: Rows, batch: StepBatch, micro_batch: int) -> tuple[Tensor, Tensor]:
        errors = torch.zeros(batch.compared.shape, device=self.device)
        places = torch.full(errors.shape, -1)
        places[batch.compared] = torch.arange(batch.pairs)
        gradients = torch.empty(batch.pairs, *rows.shape, device=self.device)
        with self.trainable():
            for images, texts, error, gradient in self._by_pair(rows, batch, micro_batch):
                errors[images, texts] = error
                gradients[places[images, texts]] = gradient
        return errors, gradients

    @with_foreign_tensors
    def weighted_gradient(self, rows: Rows, batch: StepBatch, weights: Tensor, micro_batch: int) -> Tensor:
        total = torch.zeros(rows.shape, device=self.device)
        with self.trainable():
            for images, texts, _, gradient in self._by_pair(rows, batch, micro_batch):
                total += torch.einsum("p,p...->...", weights.to(gradient)[images, texts], gradient)
        return total

    def _by_pair(self, rows: Rows, batch: StepBatch, micro_batch: int):
        """(image indices, caption indices, errors, gradients by their rows) of `micro_batch` pairs at a time."""
        sigma, seen, target, captions = self.prepared(batch)
        rows = rows.to(self.device)
        for images, texts in captions.runs(micro_batch, batch.compared):
            memory.throw_exception_if_processing_interrupted()
            leaf = rows.expand(len(images), *rows.shape).clone().requires_grad_()
            output = self.output(seen[images], sigma, captions.joined(texts, self.device), leaf)
            error = pair_error(output, target[images].to(self.device))
            yield images, texts, error.detach(), gradient_of(error, leaf, target[0].numel())

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

    def prepared(self, batch: StepBatch) -> tuple[Tensor, Tensor, Tensor, Captions]:
        """sigma (), x_t and target (B, C, H, W), and the captions; on the CPU, for a batch may be large."""
        latents, noise = (ordinary(tensor).to("cpu", torch.float32) for tensor in (batch.latents, batch.noise))
        sampling = self.base_model.model_sampling
        is_flow = self.base_model.model_type is ModelType.FLOW
        # t / 1000 for flow models: ComfyUI's own sigma(t) would apply the sampling shift
        sigma = torch.tensor(batch.t / 1000) if is_flow else ordinary(sampling.sigmas)[batch.t].cpu()
        seen, target = NOISING[self.base_model.model_type](latents, noise, sigma)
        height, width = (8 * side for side in latents.shape[-2:])
        sizes = {"width": width, "height": height, "target_width": width, "target_height": height}
        captions = []
        for cond in batch.conds:
            given = {key: value for key, value in cond.items() if value is not None}
            encoded = self.base_model.extra_conds(**(sizes | given), noise=latents[:1], device=self.device)
            captions.append({key: ordinary(value.cond) for key, value in encoded.items()})
        return sigma, seen, target, Captions(captions)

    def output(self, seen: Tensor, sigma: Tensor, texts: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """The network's raw output (P, C, H, W) for P pairs, each with its own `rows` (P, L, m, d) where given.

        With the graph of the rows; a denoised prediction instead would have to be divided by sigma.
        """

        def raw(x, sigma, c_concat, c_crossattn, control, transformer_options, **extra):
            dtype = compute_dtype(self.base_model)
            extra = {key: value.to(dtype) for key, value in extra.items()}
            t = self.base_model.model_sampling.timestep(sigma).float()
            network, context = self.base_model.diffusion_model, c_crossattn.to(dtype)
            return network(x.to(dtype), t, context=context, transformer_options=transformer_options, **extra)

        seen, sigma = seen.to(self.device), sigma.to(self.device).expand(len(seen))
        options = copy_nested_dicts(self.options)
        if rows is not None:
            options = self._inserting(options, rows, self.base_model.model_sampling.timestep(sigma))
        texts = dict(texts)
        context = texts.pop("c_crossattn")
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, options)
        call = WrapperExecutor.new_class_executor(raw, self.base_model, wrappers)
        with self.foreign.made_ordinary():
            return call.execute(seen, sigma, None, context, None, options, **texts)

    def _inserting(self, options: dict, rows: Tensor, timestep: Tensor) -> dict:
        """`options` of one call in which P samples get `rows` (P, L, m, d)."""
        state = CallState(
            "Tokens in training",
            timestep,
            negative=[False] * len(rows),
            rows={place: rows[:, self.adapter.layer(place)] for place in self.places},
            blocks=self.adapter.blocks(self.base_model.diffusion_model),
        )
        return self.adapter.inserting(options | {KEY: state}, state)
