"""What a run is, by name: its file's metadata, and what must be the same for it to be gone on with."""

import hashlib
import json
import time
from dataclasses import asdict

from ..data.dataset import Dataset
from ..families import format_blocks
from ..tokens import SoftTokens
from .config import TrainingConfig
from .inputs import TrainingInputs
from .loss import CROSS_ENTROPY
from .noising import FIRST, LAST


def file_metadata(inputs: TrainingInputs, config: TrainingConfig, dataset: Dataset, model: str) -> dict[str, str]:
    """The metadata of a trained file. `config` are the settings with what the family sets, `model` its identity."""
    return {
        "inputs": json.dumps(inputs.in_the_file() | dataset.settings, sort_keys=True),
        "training": json.dumps(asdict(config), sort_keys=True),
        "base_model": model,
        "dataset": dataset.description,
        "dataset_fingerprint": dataset.fingerprint,
        "date": time.strftime("%Y-%m-%d"),
    }


def run_identity(
    config: TrainingConfig, start: SoftTokens, was_given: bool, dataset: Dataset, model: str
) -> dict[str, object]:
    """What decides a run's result, by input name; `steps` only says where it ends.

    Tokens that the run starts by itself follow from the rest.
    """
    settings = asdict(config)
    del settings["steps"]
    later = {
        "negatives": config.negatives > 0,
        "guidance_scale": config.has_guidance,
        "guidance_weight": config.guidance_weight > 0,
        "contrast": config.contrast != CROSS_ENTROPY,
        "min_timestep": config.min_timestep != FIRST,
        "max_timestep": config.max_timestep != LAST,
    }
    for name, is_used in later.items():
        if not is_used:
            del settings[name]  # checkpoints of earlier versions do not know it
    return settings | {
        "model": model,
        "dataset": dataset.fingerprint,
        "encoders": dataset.encodings.identity,
        "blocks": format_blocks(start.blocks),
        "n_tokens": start.count,
        "time_table": start.time_table is not None,
        "init_tokens": tokens_hash(start) if was_given else None,
    }


def tokens_hash(tokens: SoftTokens) -> str:
    digest = hashlib.sha256((tokens.splice or "").encode())
    for tensor in (tokens.tokens, tokens.time_table, tokens.negative_tokens):
        if tensor is not None:
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
