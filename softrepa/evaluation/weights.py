"""Weights of the judges: read without running code, and fetched only when the user asks for it."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.hub import download_url_to_file

from ..errors import SoftREPAError, printable, said, shown
from ..files import write_atomically

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

PROCESSORS = {
    "yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "openai/clip-vit-large-patch14": "openai/clip-vit-large-patch14",
}
"""Where the tokenizer of a model is; others read no texts."""


def stay_offline() -> None:
    """Keeps the judges' libraries from the network. They read this when they are imported."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))


def read_weights(label: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file that torch saved, by name. Raises SoftREPAError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)  # gigabytes: more than pth.py holds twice
    except OSError as error:
        raise SoftREPAError(f'{label} is "{shown(path)}" ({said(error)}), expected a file of weights.') from None
    except Exception as error:  # a broken pickle, .zip or header can lead anywhere
        raise SoftREPAError(f'{label} is "{shown(path)}", expected a file of weights ({shown(error)}).') from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
        raise SoftREPAError(f'{label} is "{shown(path)}", which holds no weights by name, expected a state dict.')
    return found


def put(label: str, path: Path, module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives a module all its weights. Raises SoftREPAError where one is missing or of another shape."""
    own = module.state_dict()
    wrong = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    if wrong:
        raise SoftREPAError(
            f'{label} is "{shown(path)}", which lacks {len(wrong)} of {len(own)} weights (first {wrong[0]}), '
            "expected those of this network."
        )
    module.load_state_dict({name: weights[name] for name in own})


def fetch(label: str, published: str, hashed: str, path: Path) -> None:
    """Downloads a repository of Hugging Face into a folder, or a file, whole or not at all. Raises SoftREPAError."""
    print(f"fetching {printable(published)} to {printable(str(path))}", file=sys.stderr)
    try:
        if published.startswith("https://"):
            write_atomically(path, lambda temporary: download_url_to_file(published, str(temporary), hashed or None))
        else:
            _fetch_model(published, path)
    except (OSError, RuntimeError) as error:  # no network, no such file, another hash
        raise SoftREPAError(
            f"{label}: {shown(published)} could not be fetched ({shown(error)}), expected a connection to it."
        ) from None


def _fetch_model(published: str, path: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    partial = path.with_name(f"{path.name}.partial")
    AutoModel.from_pretrained(published).save_pretrained(partial)
    if published in PROCESSORS:
        AutoProcessor.from_pretrained(PROCESSORS[published]).save_pretrained(partial)
    partial.rename(path)
