"""What is checked before a run's first step: the model, the dataset, and one small step of both."""

import logging
from collections.abc import Callable
from itertools import chain

import torch
from comfy.model_patcher import ModelPatcher

from ...data.batches import variety
from ...data.dataset import Dataset
from ...errors import SoftREPAError
from ...training.config import CONTRASTIVE, TrainingConfig
from ...training.inputs import GO_ON, STOP
from ...training.loss import comparison, denoising_loss
from ...training.pairs import StepBatch, errors_of
from ...training.presets import RELATIVE
from ..data.checks import check_encodings
from ..families import ModelShape, model_shape
from ..models import check_plain
from .memory_use import AdaptivePairs, first_pairs, memory_line
from .session import Parts

VANISHING = 1e-4
"""Below this the contrastive loss hardly depends on any error; at temperature 0.07 that is an error of about 1."""


def checked_model(model: ModelPatcher) -> ModelShape:
    shape = model_shape(model)
    check_plain(model)
    return shape


def check_dataset(dataset: Dataset, model: ModelPatcher, config: TrainingConfig) -> None:
    """Encodings of this model, and enough different captions for a batch."""
    check_encodings(dataset, model)
    if dataset.different_captions < config.batch_size:
        raise SoftREPAError(
            f"{dataset.label} has {dataset.different_captions} images of one size with different captions, "
            f"expected at least batch_size, {config.batch_size}."
        )
    if config.negatives >= dataset.different_captions and config.negatives >= (known := variety(dataset.train)):
        raise SoftREPAError(
            f"negatives is {config.negatives}, expected at most {known - 1}: {dataset.label} has {known} images with "
            "different captions."
        )


def check_gradients(parts: Parts, notice: Callable[[str, str], None], on_no_contrast: str) -> None:
    """On two images and captions: a pair fits, every soft block feels its tokens, and the loss the errors.

    Where the loss does not, `on_no_contrast` decides. Raises SoftREPAError.
    """
    trainer, pairs, dataset = parts.trainer, parts.pairs, parts.dataset
    position = dataset.state()  # what the run draws must not depend on this
    latents, conds, wrong = trainer.next_batch(trainer.config.batch_size)
    dataset.restore(position)
    noise = torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(0))
    t = trainer.config.middle_timestep
    rows = trainer.tokens.rows(t, pairs.embed).detach()
    whole = StepBatch.of_all(latents, noise, [*conds, *chain(*wrong)], t)
    errors, gradients = pairs.one_by_one(rows, first_pairs(whole, 2))
    of_each, order = [len(captions) for captions in wrong], torch.arange(len(latents))
    compared = comparison(of_each, len(conds), trainer.config.negatives, order)
    notice("memory", memory_line(pairs, rows, whole.only(compared)))
    for layer, norm in enumerate(gradients.flatten(2).norm(dim=-1).amax(dim=0).tolist()):
        if not norm > 0:
            raise SoftREPAError(
                f"Soft block {layer} gets no gradient, expected one in each: another node replaces its attention."
            )
    config = trainer.config
    if config.objective not in CONTRASTIVE:
        return
    if trainer.guidance:
        # not with `pairs`, which would take this for how many fit at once
        errors = errors_of(AdaptivePairs(pairs.network), rows, 1, trainer.guidance).errors(first_pairs(whole, 2))
    errors = errors.detach().requires_grad_()
    contrast = trainer.objective(errors) - (config.denoising_weight or 0.0) * denoising_loss(errors)
    slope = torch.autograd.grad(contrast, errors)[0].abs().max().item()
    if slope < VANISHING:
        # the preset would not have the guidance that is learned besides
        preset = "" if config.guidance_weight else f'preset "{RELATIVE}", or '
        text = (
            f"temperature is {config.temperature:g}, far below this model's errors (about {errors.mean().item():.2f}), "
            f"so that comparing captions teaches nothing, expected {preset}temperature_mode relative with temperature "
            "1 in SoftREPA Training Options, in a new run, as resume cannot change them"
        )
        if on_no_contrast == STOP:
            raise SoftREPAError(f'{text}; or on_no_contrast "{GO_ON}".')
        logging.warning("SoftREPA: %s", text)
        notice("contrast", text)
