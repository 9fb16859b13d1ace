"""The shipped file, and the checkpoint that ComfyUI's stock loader reads.

The shipped file holds what training made: the diffusion model in 8 bits a weight, the decoder, the encoder's matrix.
The checkpoint adds the seeded text encoder (123M parameters) and is written wherever it is needed.
"""

import hashlib
import inspect
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..files import write_atomically
from . import autoencoder, text

SHIPPED = Path(__file__).with_name("smallworld.safetensors")
CHECKPOINT_NAME = "smallworld.safetensors"
TOKENS = Path(__file__).with_name("tokens.safetensors")
FORMAT = "smallworld-1"
HEADS = 3
WIDTH = 64 * HEADS
GRID = 8  # position embeddings reach to 128 pixels
FULL_CONTEXT, FULL_POOLED = 4096, 2048  # what SD3's layers take; all but the first 768 inputs are CLIP-G's and T5's


def quantise(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices as int8 with one scale a row (`key` and `key.scale`); vectors stay float32."""
    out = {}
    for key, value in weights.items():
        if value.ndim < 2:
            out[key] = value.float()
            continue
        rows = value.flatten(1).float()
        scale = rows.abs().amax(1).clamp(min=1e-12) / 127
        out[key] = (rows / scale[:, None]).round().to(torch.int8).reshape(value.shape)
        out[f"{key}.scale"] = scale
    return out


def dequantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `quantise`, float32."""
    out = {}
    for key, value in tensors.items():
        if key.endswith(".scale"):
            continue
        scale = tensors.get(f"{key}.scale")
        out[key] = value if scale is None else value.float() * scale.reshape(-1, *[1] * (value.ndim - 1))
    return out


def write_shipped(
    path: Path,
    weights: dict[str, torch.Tensor],
    decoder: dict[str, torch.Tensor],
    encoder: dict[str, torch.Tensor],
    metadata: dict[str, str],
) -> None:
    """Pack the parts; `metadata` says how they were made."""
    parts = {"model": quantise(weights), "encoder": encoder}
    parts["decoder"] = {key: value.half() for key, value in decoder.items()}
    tensors = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"format": FORMAT, **metadata}))


def position_embedding() -> torch.Tensor:
    """SD3's fixed table: sine and cosine of the column, then of the row; (1, 64, 192)."""
    omega = 10000.0 ** -(np.arange(WIDTH // 4) / (WIDTH / 4))
    angles = np.arange(GRID)[:, None] * omega
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    return torch.from_numpy(np.concatenate([line[column], line[row]], axis=1).astype(np.float32))[None]


def diffusion_tensors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trained weights under SD3's names and shapes: zero columns for the text encoders that are not there."""
    sd = dict(weights)
    for key, full in (("context_embedder.weight", FULL_CONTEXT), ("y_embedder.mlp.0.weight", FULL_POOLED)):
        sd[key] = F.pad(sd[key], (0, full - sd[key].shape[1]))
    return sd | {"pos_embed": position_embedding()}


def read_shipped(path: Path = SHIPPED) -> dict[str, dict[str, torch.Tensor]]:
    """The parts "model", "decoder" and "encoder", float32 and under training's names."""
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("format") != FORMAT:
            raise ValueError(f"{path} is not a {FORMAT} file")
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "decoder": {}, "encoder": {}}
    for key, value in load_file(path).items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    parts["model"] = dequantise(parts["model"])
    parts["decoder"] = {key: value.float() for key, value in parts["decoder"].items()}
    return parts


def cached_checkpoint(cache: Path) -> Path:
    """The full checkpoint below `cache`, written when it is not there; its folder's name follows the shipped file."""
    sources = [SHIPPED, *(Path(file) for file in (__file__, inspect.getfile(autoencoder), inspect.getfile(text)))]
    made_of = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    path = cache / f"smallworld-{made_of}" / CHECKPOINT_NAME
    return path if path.exists() else write_checkpoint(path)


def write_checkpoint(path: str | Path, shipped: str | Path = SHIPPED) -> Path:
    """Write the full checkpoint (about 270 MB) for `CheckpointLoaderSimple`; a broken write leaves no file."""
    parts, path = read_shipped(Path(shipped)), Path(path)
    groups = {
        "model.diffusion_model.": diffusion_tensors(parts["model"]),
        "first_stage_model.": autoencoder.checkpoint_tensors(parts["encoder"], parts["decoder"]),
        "text_encoders.clip_l.transformer.": text.checkpoint_tensors(),
    }
    tensors = {prefix + key: value.contiguous() for prefix, values in groups.items() for key, value in values.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"format": FORMAT}))
    return path
