"""What FlowEdit refuses, before anything is loaded."""

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...editing.methods import Method
from ...errors import SoftREPAError
from ...numbers import FROM_0, check_finite, check_number
from ..families import recognised
from ..models import check_positions


def check_counts(steps: int, n_max: int, n_min: int) -> None:
    if n_max > steps:
        raise SoftREPAError(f"n_max is {n_max}, expected at most steps, {steps}.")
    if n_min > n_max:
        raise SoftREPAError(f"n_min is {n_min}, expected at most n_max, {n_max}.")


def check_method(method: Method, n_min: int) -> None:
    if n_min > 0 and not method.samples_freely:
        raise SoftREPAError(f"n_min is {n_min}, expected 0 with {method.name}, whose every step looks at the source.")


def has_time_axis(model: ModelPatcher) -> bool:
    """Whether its latents are those of a video, (B, C, T, H, W)."""
    return model.get_model_object("latent_format").latent_dimensions == 3


def check_model(model: ModelPatcher, label: str = "model") -> None:
    """Refuses video models and those that are given an image besides the latent."""
    base = model.model
    name = type(base).__name__
    makes_stills = model.get_model_object("latent_format").latent_dimensions == 2 or (
        has_time_axis(model) and recognised(model) is not None  # all families of the table make stills
    )
    if not makes_stills:
        raise SoftREPAError(f"{label} is {name}, whose latents are video or sound, expected a model of still images.")
    config = base.model_config.unet_config
    takes_image = config.get("in_channels", 0) > config.get("out_channels", float("inf"))
    if base.concat_keys or takes_image:
        raise SoftREPAError(
            f"{label} is an inpainting or image-conditioned {name}, expected a text-to-image model; "
            "to edit only a part, set a noise mask on the latent."
        )


def check_target_model(model: ModelPatcher, target_model: ModelPatcher) -> None:
    """Refuses a second model whose latents or noise differ from the first one's."""
    check_model(target_model, "target_model")
    found, expected = (
        (type(one.model).__name__, type(one.get_model_object("latent_format")).__name__)
        for one in (target_model, model)
    )
    if found != expected:
        raise SoftREPAError(
            f"target_model is {found[0]} with {found[1]} latents, expected the family of model, "
            f"{expected[0]} with {expected[1]} latents."
        )


def check_latent(latent: Tensor, model: ModelPatcher) -> None:
    """Refuses what is no batch of still images of the model's kind and within its reach."""
    axes = ("batch", "channels", *(("1",) if has_time_axis(model) else ()), "height", "width")
    if latent.is_nested or latent.ndim != len(axes):
        found = "a nested latent" if latent.is_nested else f"of shape {list(latent.shape)}"
        raise SoftREPAError(
            f"latent_image is {found}, expected still images, [{', '.join(axes)}]; video cannot be edited."
        )
    if has_time_axis(model) and latent.shape[2] != 1:
        raise SoftREPAError(
            f"latent_image has {latent.shape[2]} frames, expected 1: video cannot be edited; VAE Encode takes a batch "
            "of pictures for one here, so encode them one by one and join them with Batch Latents."
        )
    channels = model.get_model_object("latent_format").latent_channels
    if latent.shape[1] != channels:
        raise SoftREPAError(
            f"latent_image has {latent.shape[1]} channels, expected {channels}, as {type(model.model).__name__} has: "
            "encode the image with the VAE of this model."
        )
    check_finite("latent_image", latent)
    check_positions("latent_image", model, latent.shape[-1], latent.shape[-2])
    if torch.count_nonzero(latent) == 0:
        raise SoftREPAError("latent_image is empty (all zeros), expected an image, for example from VAE Encode.")


def check_conds(conds: dict[str, list[dict]], batch: int) -> None:
    """Refuses conditioning whose rows cannot be matched with the images. `conds`: by input name."""
    for name, entries in conds.items():
        for cond in entries:
            if "cross_attn" in cond:
                check_finite(name, cond["cross_attn"])
            found = cond["cross_attn"].shape[0] if "cross_attn" in cond else 1
            if found not in (1, batch):
                raise SoftREPAError(
                    f"{name} is a batch of {found}, expected 1 or {batch}, the number of images in latent_image."
                )


def check_guidance(source_cfg: float, target_cfg: float) -> None:
    for name, value in (("source_cfg", source_cfg), ("target_cfg", target_cfg)):
        check_number(name, value, FROM_0)


def check_mask(mask: Tensor | None) -> None:
    if mask is not None:
        check_finite("noise_mask", mask)


def check_noise(noise: Tensor) -> None:
    check_finite("noise", noise)
    if torch.count_nonzero(noise) == 0:
        raise SoftREPAError("noise is all zeros, expected random noise, for example from RandomNoise.")


def check_sigmas(sigmas: Tensor, n_min: int) -> None:
    """Refuses a schedule that FlowEdit cannot run to its end."""
    check_finite("the schedule in sigmas", sigmas)
    steps = len(sigmas) - 1
    if steps < 1:
        raise SoftREPAError(f"sigmas have {len(sigmas)} values, expected 2 or more.")
    if n_min > steps:
        raise SoftREPAError(f"n_min is {n_min}, expected at most the number of steps in sigmas, {steps}.")
    if (sigmas.diff() > 0).any() or (sigmas[:-1] <= 0).any():
        raise SoftREPAError("sigmas rise or reach 0 before the end, expected values that fall to 0.")
    if sigmas[-1] != 0:
        raise SoftREPAError(
            f"sigmas end at {sigmas[-1].item():.4g}, expected 0: FlowEdit runs to the end, on SplitSigmas' low_sigmas."
        )
