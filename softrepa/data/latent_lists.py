"""A dataset of what ComfyUI's own training nodes encode: a list of latents and a list of conditionings."""

import hashlib

from torch import Tensor

from ..errors import SoftREPAError
from ..numbers import check_finite
from .ahead import AtHand
from .batches import Example, by_size, variety
from .dataset import Cond, Dataset

PIXELS = 8
"""Pixels a latent cell stands for in SD1.5, SDXL and SD3, to name sizes in pixels."""

OF_IMAGES = ("mask", "concat_mask", "concat_latent_image")
"""Tensors that nodes put beside an encoding and that say nothing of the text."""


class GivenEncodings(AtHand):
    """Latents (C, h, w), or (C, 1, h, w) of a video VAE, by image name and conds by caption, all in memory."""

    identity = "given"

    def __init__(self, latents: dict[str, Tensor], conds: dict[str, Cond], empty: Cond):
        self.latents, self.conds, self.empty = latents, conds, empty

    def latent(self, example: Example) -> Tensor:
        return self.latents[example.name]

    def cond(self, caption: str) -> Cond:
        return self.conds[caption]

    def prepare(self, captions: list[str]) -> str:
        raise SoftREPAError(
            "dataset holds encodings without their text, expected one from Caption-Image Folder for hard_negatives."
        )


def dataset_of_lists(latents: list[dict], conditioning: list[list], empty_conditioning: list[list]) -> Dataset:
    """As Make Training Dataset, Load Training Dataset and Resolution Bucket give them: image k has conditioning k.

    There is no text: a conditioning is named by the digest of its content, so equal ones count as equal captions.
    """
    images = [image for latent in latents for image in _images_of(latent)]
    conds = [cond_of(entry, "conditioning") for entries in conditioning for entry in entries]
    if len(images) != len(conds):
        raise SoftREPAError(
            f"conditioning has {len(conds)} entries, expected {len(images)}, one for each image in latents."
        )
    empty = [cond_of(entry, "empty_conditioning") for entries in empty_conditioning for entry in entries]
    if len(empty) != 1:
        raise SoftREPAError(f'empty_conditioning has {len(empty)} entries, expected one, the encoding of "".')
    _check_widths(conds, empty[0])
    examples, encodings = [], GivenEncodings({}, {}, empty[0])
    for number, (image, cond) in enumerate(zip(images, conds, strict=True), 1):
        name, caption = f"latent {number}", f"conditioning {_digest(*_tensors(cond))}"
        size = (PIXELS * image.shape[-1], PIXELS * image.shape[-2])
        examples.append(Example(name, _digest(image), (caption,), size))
        encodings.latents[name], encodings.conds[caption] = image, cond
    used, notes = _without_loners(examples)
    return Dataset("latents", used, [], encodings, notes)


def cond_of(entry: list, label: str) -> Cond:
    """A cond out of a CONDITIONING entry [(1, N, d), dict]; `label` is the input it came from."""
    context, extra = entry
    if context.ndim != 3 or context.shape[0] != 1:
        raise SoftREPAError(f"{label} has an entry of shape {list(context.shape)}, expected [1, tokens, width].")
    if extra.get("hooks") is not None:
        raise SoftREPAError(f"{label} carries hooks, expected a plain encoding; leave LoRA hooks out of training.")
    pooled = extra.get("pooled_output")
    check_finite(label, context)
    cond: Cond = {"cross_attn": context.cpu(), "pooled_output": None if pooled is None else pooled.cpu()}
    known = (*cond, *OF_IMAGES)
    rest = {name: one.cpu() for name, one in extra.items() if isinstance(one, Tensor) and name not in known}
    if rest:
        cond["rest"] = rest
    return cond


def are_stills(samples: Tensor) -> bool:
    """Whether latents are (B, C, H, W), or those of a video VAE of one frame each, (B, C, 1, H, W)."""
    return samples.ndim == 4 or (samples.ndim == 5 and samples.shape[2] == 1)


def _images_of(latent: dict) -> list[Tensor]:
    samples = latent["samples"]
    if not are_stills(samples):
        raise SoftREPAError(
            f"latents have one of shape {list(samples.shape)}, expected still images, [batch, channels, height, width]."
        )
    check_finite("an entry of latents", samples)
    return list(samples.cpu().float())


def _check_widths(conds: list[Cond], empty: Cond) -> None:
    expected = empty["cross_attn"].shape[-1]
    for cond in conds:
        if cond["cross_attn"].shape[-1] != expected:
            raise SoftREPAError(
                f"conditioning has an entry of width {cond['cross_attn'].shape[-1]}, "
                f"expected {expected}, the width of empty_conditioning."
            )


def _without_loners(examples: list[Example]) -> tuple[list[Example], list[str]]:
    """Leaves out images whose size gives no two that can be compared; such a dataset cannot be recropped."""
    partnered = [one for group in by_size(examples).values() if variety(group) > 1 for one in group]
    alone = len(examples) - len(partnered)
    if not alone or not partnered:  # without any, the dataset itself says what is missing
        return examples, []
    return partnered, [f"left out {alone} (no other image of the same size)"]


def _tensors(cond: Cond) -> list[Tensor | None]:
    """All that decides what a model is told."""
    rest = cond.get("rest", {})
    return [cond["cross_attn"], cond["pooled_output"], *(rest[name] for name in sorted(rest))]


def _digest(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(str(tuple(tensor.shape)).encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
