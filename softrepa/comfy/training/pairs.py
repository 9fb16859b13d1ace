"""Denoising errors of image-caption pairs by a MODEL's own network."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, copy_nested_dicts, get_all_wrappers, merge_nested_dicts
from torch import Tensor

from ...data.dataset import Cond
from ...errors import SoftREPAError
from ...tokens import SoftTokens
from ...training.noising import pair_error
from ...training.pairs import Rows, StepBatch
from ..families import adapter_of, model_shape
from ..families.noising import sigma_at
from ..families.noising import timestep as timestep_at
from ..tokens.attention import OVERRIDE
from ..tokens.patching import apply_tokens, compute_dtype
from .frozen import above_pytorch, ordinary


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
    """Each caption as keywords of the network: tensors (1, ...), wherever they lie, and what is none.

    of_all: keywords of which the network takes one for all pairs that run at once.
    """

    of: list[dict[str, Any]]
    of_all: Collection[str] = ()

    def joined(self, indices: list[int], device: torch.device) -> dict[str, Any]:
        """Of captions of one form: (P, ...) each, on `device`; a caption of several pairs is brought there once."""
        found = {}
        for key, one in self.of[indices[0]].items():
            if isinstance(one, Tensor) and key in self.of_all:
                one = one.to(device)
            elif isinstance(one, Tensor):
                there = {j: self.of[j][key].to(device) for j in set(indices)}
                one = torch.cat([there[j] for j in indices])
            found[key] = one
        return found

    def runs(self, micro_batch: int, compared: Tensor) -> Iterator[tuple[list[int], list[int]]]:
        """The pairs of `compared` (B, J) as (image indices, caption indices).

        At most `micro_batch` at a time, of captions of one form each: tensors of the same shapes, all else the same.
        """

        def form_of(key: str, one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            return one.tolist() if key in self.of_all else one.shape

        forms: dict[str, list[int]] = {}
        for j, caption in enumerate(self.of):
            form = {key: form_of(key, one) for key, one in caption.items()}
            forms.setdefault(str(sorted(form.items())), []).append(j)
        for captions in forms.values():
            pairs = [(i, j) for j in captions for i in compared[:, j].nonzero().flatten().tolist()]
            for start in range(0, len(pairs), micro_batch):
                run = pairs[start : start + micro_batch]
                yield [i for i, _ in run], [j for _, j in run]


class PairNetwork:
    """The network of a loaded MODEL on pairs, through the model's own patches and wrappers, tokens among them."""

    def __init__(self, model: ModelPatcher):
        self.adapter = adapter_of(model_shape(model).family)
        self.base_model = model.model
        self.device = model.load_device
        """Where the network computes, whatever part of it is offloaded."""
        kind, known = self.base_model.model_type, self.adapter.noisings
        if kind not in known:
            expected = " or ".join(one.name for one in known)
            raise SoftREPAError(f"Model predicts {kind.name}, expected {expected}.")
        if self.adapter.hears_steps(self.base_model.diffusion_model):
            raise SoftREPAError(
                "Model is distilled to jump from one step of its sampling to the next (meanflow), expected one that is "
                "not: no error at a single noise level can be measured of it."
            )
        self.noised = known[kind]
        self.options = copy_nested_dicts(model.model_options["transformer_options"])
        merge_nested_dicts(self.options.setdefault("wrappers", {}), model.wrappers, copy_dict1=False)
        self.options[OVERRIDE] = self.attention()

    def attention(self):
        """The attention override of a call: above PyTorch's attention the one that is on the model, if there is any."""
        return above_pytorch(self.options.get(OVERRIDE))

    def errors(self, rows: Rows | None, batch: StepBatch, micro_batch: int) -> Tensor:
        """(B, J) without gradients, `micro_batch` pairs at a time; 0 where pairs are not compared."""
        sigma, seen, target, captions = self.prepared(batch)
        errors = torch.zeros(batch.compared.shape, device=self.device)
        with torch.no_grad():
            for images, texts in captions.runs(micro_batch, batch.compared):
                memory.throw_exception_if_processing_interrupted()
                own = None if rows is None else rows.to(self.device).expand(len(images), *rows.shape)
                output = self.output(seen[images], sigma, captions.joined(texts, self.device), own)
                errors[images, texts] = pair_error(output, target[images].to(self.device))
        return errors

    def guided(self, rows: Rows, batch: StepBatch, empty: Cond, scale: float, micro_batch: int) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598), by the network as it is without `rows`."""
        sigma, seen, _, captions = self.prepared(batch)
        *_, nothing = self.prepared(replace(batch, conds=[empty]))
        found = torch.zeros(seen.shape)
        with torch.no_grad():
            for images, texts in captions.runs(micro_batch, batch.compared):
                memory.throw_exception_if_processing_interrupted()
                unconditional, conditional = (
                    self.output(seen[images], sigma, some.joined(which, self.device)).float()
                    for some, which in ((nothing, [0] * len(images)), (captions, texts))
                )
                found[images] = (unconditional + scale * (conditional - unconditional)).cpu()
        return found

    def unconditional(self, rows: Rows, batch: StepBatch, empty: Cond, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Predictions with `rows` under `empty`, and targets, (B, C, H, W) on the CPU."""
        images_alone = batch.under(empty)
        sigma, seen, target, captions = self.prepared(images_alone)
        found = torch.zeros(seen.shape)
        with torch.no_grad():
            for images, texts in captions.runs(micro_batch, images_alone.compared):
                memory.throw_exception_if_processing_interrupted()
                own = rows.to(self.device).expand(len(images), *rows.shape)
                output = self.output(seen[images], sigma, captions.joined(texts, self.device), own)
                found[images] = output.float().cpu()
        return found, target

    def prepared(self, batch: StepBatch) -> tuple[Tensor, Tensor, Tensor, Captions]:
        """sigma (), x_t and target (B, C, H, W), and the captions; on the CPU, for a batch may be large."""
        latents, noise = (ordinary(tensor).to("cpu", torch.float32) for tensor in (batch.latents, batch.noise))
        sigma = sigma_at(self.base_model.model_sampling, batch.t)
        seen, target = self.noised(latents, noise, sigma)
        target = target if batch.targets is None else batch.targets
        height, width = (8 * side for side in latents.shape[-2:])
        sizes = {"width": width, "height": height, "target_width": width, "target_height": height}
        captions = []
        for cond in batch.conds:
            given = {key: value for key, value in cond.items() if value is not None and key != "rest"}
            given |= cond.get("rest", {})
            encoded = self.base_model.extra_conds(**(sizes | given), noise=latents[:1], device=self.device)
            found = {key: value.cond for key, value in encoded.items()}
            captions.append({key: ordinary(one) if isinstance(one, Tensor) else one for key, one in found.items()})
        return sigma, seen, target, Captions(captions, self.adapter.of_all_samples(self.base_model.diffusion_model))

    def output(self, seen: Tensor, sigma: Tensor, texts: dict[str, Any], rows: Tensor | None = None) -> Tensor:
        """The network's raw output (P, C, H, W) for P pairs, each with its own `rows` (P, L, m, d) where given.

        With the graph of the rows; a denoised prediction instead would have to be divided by sigma.
        """

        def raw(x, sigma, c_concat, c_crossattn, control, transformer_options, **extra):
            dtype = compute_dtype(self.base_model)
            extra = {
                key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for key, value in extra.items()
            }
            t = self.base_model.model_sampling.timestep(sigma).float()
            network, context = self.base_model.diffusion_model, c_crossattn.to(dtype)
            return network(x.to(dtype), t, context=context, transformer_options=transformer_options, **extra)

        seen, sigma = seen.to(self.device), sigma.to(self.device).expand(len(seen))
        options = copy_nested_dicts(self.options)
        if rows is not None:
            options = self.inserting(options, rows, timestep_at(self.base_model.model_sampling, sigma))
        texts = dict(texts)
        context = texts.pop("c_crossattn")
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, options)
        call = WrapperExecutor.new_class_executor(raw, self.base_model, wrappers)
        return call.execute(seen, sigma, None, context, None, options, **texts)

    def inserting(self, options: dict, rows: Tensor, timestep: Tensor) -> dict:
        """`options` of one call in which P samples get `rows` (P, L, m, d) of their own."""
        raise SoftREPAError("Tokens are given to a network that only measures, expected them on its model.")
