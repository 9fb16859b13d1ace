"""CONFIG of the command line: the nodes' inputs by name, in a .json file or in a file that was trained with them."""

from dataclasses import fields
from pathlib import Path

from . import token_files
from .data.inputs import DatasetInputs
from .errors import SoftREPAError, said, shown
from .files import parse_json, read_bounded
from .training.inputs import ALSO, KINDS, TrainingInputs

PLACE = ("checkpoint", "folder")
"""What every command takes: a model, and images with captions."""
DATA = {field.name: field.default for field in fields(DatasetInputs)}
CLIP = {"tokenizer_options": {}, "clip_layer": 0}
"""What nodes between the model and the dataset may have set on the CLIP, as `comfy.sd.CLIP` names it."""
WORDS = ("init_tokens", "preview_prompt")
"""Names and texts that stand for what other nodes give the training node."""
ALL_KINDS: dict[str, type] = (
    dict.fromkeys((*PLACE, *WORDS), str) | {name: type(value) for name, value in (DATA | CLIP).items()} | KINDS
)
"""Of every input that a CONFIG may hold."""

MOST_NUMBER = 2**63
"""A seed is smaller."""
MOST_BYTES = 1 << 20
"""Of a .json file of inputs."""


def read_config(path: Path) -> dict:
    """Inputs by name: of a .json file, or those that a trained .safetensors file was made with."""
    label = f'CONFIG "{shown(path)}"'
    if path.suffix == ".safetensors":
        metadata = token_files.load(path).metadata
        if "inputs" not in metadata:
            raise SoftREPAError(f"{label} does not say how it was trained, expected a file that this pack trained.")
        content: bytes | str = metadata["inputs"]
    try:
        if path.suffix != ".safetensors":
            content = read_bounded(path, MOST_BYTES)
        config = parse_json(content)
    except OSError as error:
        raise SoftREPAError(f"{label} cannot be read ({said(error)}), expected a .json file of inputs.") from None
    if not isinstance(config, dict):
        raise SoftREPAError(f"{label} holds a {type(config).__name__}, expected inputs by name.")
    return config


def check_to_train(config: dict) -> None:
    """Raises SoftREPAError where `config` lacks an input that training needs, or `check_inputs` refuses it."""
    required = (*PLACE, *TrainingInputs.REQUIRED)
    if missing := [name for name in required if name not in config]:
        raise SoftREPAError(f"CONFIG lacks {', '.join(missing)}, expected all of {', '.join(required)}.")
    check_inputs(config)


def check_to_score(config: dict) -> None:
    """As `check_to_train`, for scoring."""
    if missing := [name for name in PLACE if name not in config]:
        raise SoftREPAError(f"CONFIG lacks {', '.join(missing)}, expected {' and '.join(PLACE)}.")
    check_inputs(config)


def check_inputs(config: dict) -> None:
    """Every name and the kind of every value. Raises SoftREPAError."""
    check_kinds(config, ALL_KINDS, "the dataset and training nodes")


def check_kinds(config: dict, kinds: dict[str, type], owner: str) -> None:
    """As `check_inputs`, of the inputs that `owner` takes."""
    if unknown := sorted(config.keys() - kinds.keys()):
        raise SoftREPAError(f"CONFIG has {shown(', '.join(unknown))}, expected only inputs of {owner}.")
    for name, value in config.items():
        kind = kinds[name]
        fits = type(value) in (kind, ALSO.get(name)) or (kind is float and type(value) is int)
        if not fits:
            raise SoftREPAError(f"CONFIG: {name} is {shown(repr(value))}, expected a value of type {kind.__name__}.")
        if kind in (int, float) and not -MOST_NUMBER <= value <= MOST_NUMBER:  # nor is NaN, which JSON can hold
            raise SoftREPAError(f"CONFIG: {name} is {shown(value)}, expected a number within {MOST_NUMBER:.0e}.")
