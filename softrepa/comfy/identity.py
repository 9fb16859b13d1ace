"""What a run is, by name: its file's metadata, and what must be the same for it to be gone on with."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
from comfy.model_patcher import ModelPatcher

from ..dataset import Dataset
from ..families import format_blocks
from ..tokens import SoftTokens
from ..training_config import TrainingConfig


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
    """Its kind and a hash of samples of every weight.

    Weights as they were before LoRAs, and the LoRAs apart, so that it does not matter what is loaded.
    """
    digest = hashlib.sha256()
    prefix = "diffusion_model."
    for name, weight in sorted(model.model.diffusion_model.state_dict().items()):
        kept = model.backup.get(prefix + name)
        digest.update(name.encode() + sample(weight if kept is None else kept.weight))
    for name, patches in sorted(model.patches.items(), key=lambda item: str(item[0])):
        if str(name).startswith(prefix):
            digest.update(str(name).encode())
            for part in _parts(patches):
                digest.update(sample(part) if isinstance(part, torch.Tensor) else repr(part).encode())
    return f"{type(model.model).__name__} {digest.hexdigest()[:16]}"


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
