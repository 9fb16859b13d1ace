"""Denoising errors of image-caption pairs by a MODEL's own network, and their gradients by the soft rows."""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import comfy.model_management as memory
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, copy_nested_dicts, get_all_wrappers, merge_nested_dicts
from torch import Tensor

from ..dataset import Cond
from ..errors import SoftREPAError
from ..families import Blocks
from ..noising import noised_eps, noised_flow, pair_error
from ..tokens import SoftTokens
from . import mmdit, unet
from .frozen import OrdinaryWeights, differentiable_attention, ordinary
from .models import model_shape
from .patching import apply_tokens, compute_dtype
from .state import KEY, CallState

Found = TypeVar("Found")
NOISING = {ModelType.FLOW: noised_flow, ModelType.EPS: noised_eps}


def is_out_of_memory(error: RuntimeError) -> bool:
    """MPS has no exception of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


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
        return PairNetwork(model).errors(latents, noise, conds, t, micro_batch)


@dataclass(frozen=True)
class Captions:
    """Each caption as keyword tensors of the network, (1, ...) each."""

    of: list[dict[str, Tensor]]

    def joined(self, indices: list[int]) -> dict[str, Tensor]:
        return {key: torch.cat([self.of[j][key] for j in indices]) for key in self.of[0]}

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


class PairNetwork:
    """The network of a loaded MODEL on pairs, through the model's own patches and wrappers.

    With `trained_blocks` the rows given to `gradients` are inserted there.
    """

    def __init__(self, model: ModelPatcher, trained_blocks: Blocks | None = None, checkpointing: bool = True):
        self.shape = model_shape(model)
        self.base_model = model.model
        if self.base_model.model_type not in NOISING:
            raise SoftREPAError(f"Model predicts {self.base_model.model_type.name}, expected EPS or FLOW.")
        if trained_blocks is not None:
            if model.get_attachment(KEY) is not None:
                raise SoftREPAError("Model has soft tokens on it, expected the plain model; go on with init_tokens.")
            model = model.clone()
            if isinstance(trained_blocks, int):
                mmdit.install_trainable(model, checkpointing)
                mmdit.install(model, self, layers=trained_blocks)
            else:
                unet.install(model, self, before=None)
        self.trained_blocks = trained_blocks
        self.recomputes_unet = checkpointing and self.shape.family.is_unet
        self.options = copy_nested_dicts(model.model_options["transformer_options"])
        merge_nested_dicts(self.options.setdefault("wrappers", {}), model.wrappers, copy_dict1=False)
        inner = self.options.get("optimized_attention_override")
        self.options["optimized_attention_override"] = differentiable_attention(inner)

    def errors(self, latents: Tensor, noise: Tensor, conds: list[Cond], t: int, micro_batch: int) -> Tensor:
        """(B, B) without gradients."""
        sigma, seen, target, captions = self.prepared(latents, noise, conds, t)
        errors = torch.empty(len(latents), len(conds), device=seen.device)
        every = torch.ones(errors.shape, dtype=torch.bool)
        for images, texts in captions.runs(micro_batch, every):
            output = self.output(seen[images], sigma, captions.joined(texts))
            errors[images, texts] = pair_error(output, target[images])
        return errors

    def gradients(
        self,
        rows: Tensor,
        latents: Tensor,
        noise: Tensor,
        conds: list[Cond],
        t: int,
        micro_batch: int,
        compared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Errors (B, J) and each pair's gradient of its own error by `rows` (L, m, d): (P, L, m, d).

        Of the P pairs in `compared` (B, J) row by row, or of all; other errors are 0.
        """
        sigma, seen, target, captions = self.prepared(latents, noise, conds, t)
        rows = rows.to(seen.device)
        errors = torch.zeros(len(latents), len(conds), device=seen.device)
        if compared is None:
            compared = torch.ones(errors.shape, dtype=torch.bool)
        places = torch.full(errors.shape, -1)
        places[compared] = torch.arange(int(compared.sum()))
        gradients = torch.empty(int(compared.sum()), *rows.shape, device=seen.device)
        for images, texts in captions.runs(micro_batch, compared):
            memory.throw_exception_if_processing_interrupted()
            leaf = rows.expand(len(images), *rows.shape).clone().requires_grad_()
            error = pair_error(self.output(seen[images], sigma, captions.joined(texts), leaf), target[images])
            errors[images, texts] = error.detach()
            gradients[places[images, texts]] = gradient_of(error, leaf, target[0].numel())
        return errors, gradients

    def embed(self, rows: Tensor) -> Tensor:
        """The model's context embedder on 4096-wide rows, with its graph."""
        with OrdinaryWeights():
            rows = rows.to(self.base_model.device, compute_dtype(self.base_model))
            return self.base_model.diffusion_model.context_embedder(rows).float()

    def prepared(self, latents: Tensor, noise: Tensor, conds: list[Cond], t: int):
        """sigma (), x_t and target (B, C, H, W), and the captions on the network's device."""
        device = self.base_model.device
        latents, noise = (ordinary(tensor).to(device, torch.float32) for tensor in (latents, noise))
        sampling = self.base_model.model_sampling
        is_flow = self.base_model.model_type is ModelType.FLOW
        # t / 1000 for flow models: ComfyUI's own sigma(t) would apply the sampling shift
        sigma = torch.tensor(t / 1000) if is_flow else ordinary(sampling.sigmas)[t]
        sigma = sigma.to(device)
        seen, target = NOISING[self.base_model.model_type](latents, noise, sigma)
        height, width = (8 * side for side in latents.shape[-2:])
        sizes = {"width": width, "height": height, "target_width": width, "target_height": height}
        captions = []
        for cond in conds:
            given = {key: value for key, value in cond.items() if value is not None}
            encoded = self.base_model.extra_conds(**(sizes | given), noise=latents[:1], device=device)
            captions.append({key: ordinary(value.cond).to(device) for key, value in encoded.items()})
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

        options = copy_nested_dicts(self.options)
        if rows is not None:
            options[KEY] = CallState(self, rows=self._placed(rows))
        texts = dict(texts)
        context = texts.pop("c_crossattn")
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, options)
        call = WrapperExecutor.new_class_executor(raw, self.base_model, wrappers)
        network = self.base_model.diffusion_model
        recomputing = unet.recomputed_blocks(network) if rows is not None and self.recomputes_unet else nullcontext()
        with OrdinaryWeights(), recomputing:
            return call.execute(seen, sigma.expand(len(seen)), None, context, None, options, **texts)

    def _placed(self, rows: Tensor) -> dict:
        """Rows (P, L, m, d) by where they are inserted."""
        if isinstance(self.trained_blocks, int):
            return {layer: rows[:, layer] for layer in range(self.trained_blocks)}
        return {unet.STAGES[name]: rows[:, 0] for name in self.trained_blocks or ()}
