"""Which MODEL, CLIP or VAE it is: known by samples of its weights and, apart from these, by its LoRAs."""

import hashlib
from collections.abc import Iterator

import comfy.sd
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from torch import nn

NETWORK = "diffusion_model."
"""What the names of a network's weights begin with among those of a MODEL."""


def model_identity(model: ModelPatcher) -> str:
    """The kind of a MODEL and a hash of its weights, whatever is loaded."""
    digest = hashlib.sha256()
    for name, weight in sorted(_unpatched(model, model.model.diffusion_model, NETWORK)):
        digest.update(name.encode() + _sample(weight))
    _digest_patches(digest, model, NETWORK)
    return f"{type(model.model).__name__} {digest.hexdigest()[:16]}"


def clip_identity(clip: comfy.sd.CLIP) -> str:
    """Changes with the weights, their precision, clip skip, tokenizer options and LoRAs."""
    facts = [type(clip.cond_stage_model).__name__, clip.layer_idx, sorted(clip.tokenizer_options.items())]
    return _encoder_identity(clip.patcher, clip.cond_stage_model, facts)


def vae_identity(vae: comfy.sd.VAE) -> str:
    """Changes with the weights and the precision the VAE computes in."""
    facts = [type(vae.first_stage_model).__name__, str(vae.vae_dtype)]
    return _encoder_identity(vae.patcher, vae.first_stage_model, facts)


def vision_identity(vision: ClipVisionModel) -> str:
    """Changes with the weights and their precision."""
    return _encoder_identity(vision.patcher, vision.model, [vision.model_type, vision.image_size])


def _encoder_identity(patcher: ModelPatcher, module: nn.Module, facts: list) -> str:
    """A hash of a CLIP's or VAE's weights, their precision and `facts`, whatever is loaded."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, weight in _unpatched(patcher, module):
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + _sample(weight))
    _digest_patches(digest, patcher)
    return digest.hexdigest()[:16]


def _unpatched(patcher: ModelPatcher, module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by name, as they were before LoRAs that are loaded now were added to them in place."""
    for name, weight in module.state_dict().items():
        kept = patcher.backup.get(prefix + name)
        yield name, weight if kept is None else kept.weight


def _digest_patches(digest, patcher: ModelPatcher, prefix: str = "") -> None:
    """Adds the LoRAs, which are known by what they hold."""
    for name, patches in sorted(patcher.patches.items(), key=lambda item: str(item[0])):
        if str(name).startswith(prefix):
            digest.update(str(name).encode())
            for part in _parts(patches):
                digest.update(_sample(part) if isinstance(part, torch.Tensor) else repr(part).encode())


def _sample(weight: torch.Tensor) -> bytes:
    """A few values of a weight: enough to tell models apart, quick for large ones."""
    return weight.flatten()[:: max(1, weight.numel() // 16)][:16].float().cpu().contiguous().numpy().tobytes()


def _parts(value: object) -> Iterator[object]:
    """The numbers, words and tensors of a weight's patches, whatever adapter holds them."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _parts(part)
    elif hasattr(value, "weights"):
        yield type(value).__name__
        yield from _parts(value.weights)
    elif value is None or isinstance(value, (str, int, float, torch.Tensor)):
        yield value
    else:
        yield type(value).__name__
