"""What a run is, by name: its file's metadata, and what must be the same for it to be gone on with."""

import hashlib
import json
import time
from dataclasses import asdict

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
    """Its kind and a hash of a few values of every weight: enough to tell models apart, quick for large ones."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.model.diffusion_model.state_dict().items()):
        sample = weight.flatten()[:: max(1, weight.numel() // 16)][:16].float().cpu()
        digest.update(name.encode() + sample.contiguous().numpy().tobytes())
    return f"{type(model.model).__name__} {digest.hexdigest()[:16]}"
