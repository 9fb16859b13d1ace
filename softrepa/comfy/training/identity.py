"""What a run is, by name: its file's metadata, and what must be the same for it to be gone on with.

Models and encoders are known by samples of their weights and, apart from these, by their LoRAs.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...data.dataset import Dataset
from ...families import format_blocks
from ...tokens import SoftTokens
from ...training.config import TrainingConfig


def description(base_model: str, dataset: Dataset, config: TrainingConfig) -> dict[str, str]:
    """The metadata of a trained file."""
    return {
        "training": json.dumps(asdict(config), sort_keys=True),
        "base_model": base_model,
        "dataset": dataset.description,
        "dataset_fingerprint": dataset.fingerprint,
        "date": time.strftime("%Y-%m-%d"),
    }


def identity(
    config: TrainingConfig, start: SoftTokens, was_given: bool, base_model: str, dataset: Dataset
) -> dict[str, object]:
    """What decides a run's result, by input name; `steps` only says where it ends.

    Tokens that the run starts by itself follow from the rest.
    """
    settings = asdict(config)
    del settings["steps"]
    return settings | {
        "model": base_model,
        "dataset": dataset.fingerprint,
        "encoders": dataset.encodings.identity,
        "blocks": format_blocks(start.blocks),
        "n_tokens": start.count,
        "time_table": start.time_table is not None,
        "init_tokens": tokens_hash(start) if was_given else None,
    }


def tokens_hash(tokens: SoftTokens) -> str:
    digest = hashlib.sha256()
    for tensor in (tokens.tokens, tokens.time_table, tokens.negative_tokens):
        if tensor is not None:
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_model(model: ModelPatcher) -> str:
    """The kind of a MODEL and a hash of its weights, whatever is loaded."""
    digest = hashlib.sha256()
    for name, weight in sorted(unpatched(model, model.model.diffusion_model, PREFIX)):
        digest.update(name.encode() + sample(weight))
    digest_patches(digest, model, PREFIX)
    return f"{type(model.model).__name__} {digest.hexdigest()[:16]}"


def encoder(patcher: ModelPatcher, module: nn.Module, facts: list) -> str:
    """A hash of a CLIP's or VAE's weights, their precision and `facts`, whatever is loaded."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, weight in unpatched(patcher, module):
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + sample(weight))
    digest_patches(digest, patcher)
    return digest.hexdigest()[:16]


PREFIX = "diffusion_model."
"""Of the network's weights among those of a MODEL."""


def unpatched(patcher: ModelPatcher, module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by name, as they were before LoRAs that are loaded now were added to them in place."""
    for name, weight in module.state_dict().items():
        kept = patcher.backup.get(prefix + name)
        yield name, weight if kept is None else kept.weight


def digest_patches(digest, patcher: ModelPatcher, prefix: str = "") -> None:
    """Adds the LoRAs, which are known by what they hold."""
    for name, patches in sorted(patcher.patches.items(), key=lambda item: str(item[0])):
        if str(name).startswith(prefix):
            digest.update(str(name).encode())
            for part in _parts(patches):
                digest.update(sample(part) if isinstance(part, torch.Tensor) else repr(part).encode())


def sample(weight: torch.Tensor) -> bytes:
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
