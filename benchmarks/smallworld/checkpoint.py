"""The shipped file, and the checkpoint that ComfyUI's stock loader reads.

The shipped file holds what training made: the diffusion model in 8 bits a weight, the decoder, the encoder's matrix.
The checkpoint adds the seeded text encoder (123M parameters) and is written wherever it is needed.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from . import autoencoder, model, text
from .fitting import save_atomically

SHIPPED = Path(__file__).with_name("smallworld.safetensors")
CHECKPOINT_NAME = "smallworld.safetensors"
TOKENS = Path(__file__).with_name("tokens.safetensors")
FORMAT = "smallworld-1"


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
    save_atomically(tensors, path, {"format": FORMAT, **metadata})


def read_shipped(path: Path = SHIPPED) -> dict[str, dict[str, torch.Tensor]]:
    """The parts "model", "decoder" and "encoder", float32 and under training's names."""
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("format") != FORMAT:
            raise ValueError(f"{path} is not a {FORMAT} file")
    parts = {"model": {}, "decoder": {}, "encoder": {}}
    for key, value in load_file(path).items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    parts["model"] = dequantise(parts["model"])
    parts["decoder"] = {key: value.float() for key, value in parts["decoder"].items()}
    return parts


def cached_checkpoint(cache: Path) -> Path:
    """The full checkpoint below `cache`, written when it is not there; its folder's name follows the shipped file."""
    sources = (SHIPPED, __file__, *(module.__file__ for module in (autoencoder, model, text)))
    made_of = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()[:12]
    path = cache / f"smallworld-{made_of}" / CHECKPOINT_NAME
    return path if path.exists() else write_checkpoint(path)


def write_checkpoint(path: str | Path, shipped: str | Path = SHIPPED) -> Path:
    """Write the full checkpoint (about 270 MB) for `CheckpointLoaderSimple`; a broken write leaves no file."""
    parts, path = read_shipped(Path(shipped)), Path(path)
    groups = {
        "model.diffusion_model.": model.checkpoint_tensors(parts["model"]),
        "first_stage_model.": autoencoder.checkpoint_tensors(parts["encoder"], parts["decoder"]),
        "text_encoders.clip_l.transformer.": text.checkpoint_tensors(),
    }
    tensors = {prefix + key: value for prefix, values in groups.items() for key, value in values.items()}
    save_atomically(tensors, path, {"format": FORMAT})
    return path
