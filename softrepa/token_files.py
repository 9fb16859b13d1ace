"""Token files: our safetensors format, that of anima_lora, and the .pth pairs that SoftREPA and AGSM publish.

No pickle is executed: `softrepa.pth` says how `.pth` files are read.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from .errors import SoftREPAError, said, shown
from .families import PADDED, Blocks, Family, family_named, family_of_shape, format_blocks, parse_blocks, where
from .files import is_file, is_folder, read_tensors, write_tensors
from .pth import read_pth
from .tokens import END, SoftTokens

FORMAT = "softrepa"
FORMAT_VERSION = "1"
TENSORS = ("tokens", "time_table", "negative_tokens")
SPLICE = "splice_position"
OURS = ("format", "format_version", "family", "blocks", SPLICE)
"""What the metadata says of the tokens themselves."""
OF_ANIMA_LORA = {"tokens", "t_offsets.weight"}
"""What sorryhyun/anima_lora's networks/methods/soft_tokens.py saves."""

PUBLISHED = {"dc_tokens.pth": "dc_t_tokens.pth", "soft_tokens.pth": "soft_t_tokens.pth"}
"""Published token files (SoftREPA, AGSM) and the time table that stands beside each."""
AGSM_TOKENS = "soft_tokens.pth"

MOST_BYTES = 1 << 28
"""Of a token file: three times those that 64 tokens for every layer of the largest SD3.5 take."""
SHOWN_TEXT, SHOWN_TEXTS = 2000, 50
"""Characters of a metadata string, and strings, in a summary."""


def load(path: str | Path, family: str | None = None, blocks: str | None = None, name: str | None = None) -> SoftTokens:
    """Reads a .safetensors file, a published .pth file, or a folder that holds one.

    `family` and `blocks` override what the file says; `name` is used in messages. Raises SoftREPAError.
    """
    path = Path(path)
    label = f'Tokens "{shown(name or path.name)}"'
    path = _resolved(path, label)
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path, label)
    else:
        tensors, metadata = _read_published(path, label), {}
    return _assemble(tensors, metadata, family, blocks, name or path.name)


def save(tokens: SoftTokens, path: str | Path) -> Path:
    """Writes our format; `path` holds the old file or the whole new one, never a part."""
    path = Path(path)
    tensors = {
        key: getattr(tokens, key).cpu().clone(memory_format=torch.contiguous_format)
        for key in TENSORS
        if getattr(tokens, key) is not None
    }
    metadata = tokens.metadata | {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "family": tokens.family.name,
        "blocks": format_blocks(tokens.blocks),
    }
    if tokens.splice is not None:
        metadata[SPLICE] = tokens.splice
    write_tensors(path, tensors, metadata)
    return path


def _resolved(path: Path, label: str) -> Path:
    """The file to read: `path` itself, or the published file in the folder `path`."""
    if is_folder(path):
        found = [path / name for name in PUBLISHED if is_file(path / name)]
        if len(found) == 1:
            return found[0]
        tables = [table for table in PUBLISHED.values() if is_file(path / table)]
        if not found and tables:
            raise SoftREPAError(f"{label}: the folder has a time table ({tables[0]}) without tokens, expected both.")
        raise SoftREPAError(
            f"{label}: the folder holds {len(found)} published token files, expected one of {', '.join(PUBLISHED)}."
        )
    if not os.path.lexists(path):
        raise SoftREPAError(f"{label}: no file at {shown(path)}, expected a .safetensors or published .pth file.")
    if path.name in PUBLISHED.values():
        raise SoftREPAError(f"{label}: this is a time table without tokens, expected its {_tokens_of(path.name)}.")
    if path.suffix not in (".safetensors", ".pth"):
        raise SoftREPAError(f'{label}: the file ends in "{shown(path.suffix)}", expected .safetensors or .pth.')
    return path


def _tokens_of(table: str) -> str:
    return next(tokens for tokens, beside in PUBLISHED.items() if beside == table)


def _read_safetensors(path: Path, label: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors, metadata = read_tensors(path, MOST_BYTES)
    except OSError as error:
        raise SoftREPAError(
            f"{label}: the .safetensors file cannot be read ({said(error)}), expected a whole file."
        ) from None
    if metadata.get("format", FORMAT) not in (FORMAT, "pt"):  # "pt" is what safetensors' own savers write
        raise SoftREPAError(f'{label}: format is "{shown(metadata["format"])}", expected "{FORMAT}".')
    if tensors.keys() == OF_ANIMA_LORA:
        return _of_anima_lora(tensors, metadata, label)
    foreign = sorted(tensors.keys() - set(TENSORS))
    if tensors.keys() == {"time_table"}:
        raise SoftREPAError(f"{label}: the file has a time table without tokens, expected both.")
    if "tokens" not in tensors or foreign:
        found = shown(", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else ""))
        raise SoftREPAError(
            f"{label}: the .safetensors file holds {found or 'no tensors'}, "
            f"expected `tokens` and at most {' and '.join(TENSORS[1:])}."
        )
    version = metadata.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise SoftREPAError(
            f'{label}: format_version is "{shown(version)}", expected "{FORMAT_VERSION}"; update this pack.'
        )
    return tensors, metadata


def _of_anima_lora(tensors: dict[str, Tensor], metadata: dict[str, str], label: str):
    """In our terms: [L, m, d] with a table [n, L d], or of each two, of which the first is for sampling."""
    tokens, table = tensors["tokens"], tensors["t_offsets.weight"]
    says = {"family": PADDED.name, SPLICE: metadata.get("ss_splice_position", END)}
    if tokens.ndim == 4:
        columns = tokens.shape[1] * tokens.shape[3]
        if len(tokens) != 2 or table.shape[1:] != (2 * columns,):
            raise SoftREPAError(
                f"{label}: tokens have shape {list(tokens.shape)} and t_offsets.weight {list(table.shape)}, expected "
                "[2, layers, m, width] and [n, 2 x layers x width]."
            )
        tokens, table = tokens[0], table[:, :columns]
        says["bank"] = "the first of two, as anima_lora samples; its other one is for training"
    return {"tokens": tokens, "time_table": table}, metadata | says


def _read_published(path: Path, label: str) -> dict[str, Tensor]:
    tensors = {"tokens": _read_pth(path, label)}
    table = path.with_name(PUBLISHED.get(path.name, "")) if path.name in PUBLISHED else None
    if table is not None and os.path.lexists(table):
        tensors["time_table"] = _read_pth(table, label)
    if path.name == AGSM_TOKENS:
        banks = tensors["tokens"]
        if banks.ndim < 3 or banks.shape[0] != 2:
            raise SoftREPAError(
                f"{label}: {AGSM_TOKENS} has shape {list(banks.shape)}, "
                "expected a positive and a negative bank [2, ...]."
            )
        tensors["tokens"], tensors["negative_tokens"] = banks.unbind(0)
    return tensors


def _read_pth(path: Path, label: str) -> Tensor:
    try:
        return read_pth(path, MOST_BYTES)
    except OSError as error:
        raise SoftREPAError(
            f"{label}: {path.name} cannot be read ({said(error)}), "
            "expected a plain tensor or an nn.Embedding that torch saved."
        ) from None


def _assemble(
    tensors: dict[str, Tensor], metadata: dict[str, str], family: str | None, blocks: str | None, name: str
) -> SoftTokens:
    label = f'Tokens "{shown(name)}"'
    family_name = family or metadata.get("family")
    shape = tuple(tensors["tokens"].shape)
    row: Family = family_named(family_name, label) if family_name else family_of_shape(shape, label)
    blocks_text = blocks or metadata.get("blocks")
    parsed = parse_blocks(blocks_text, row, label) if blocks_text else _published_blocks(row, shape)
    kept = {key: text for key, text in metadata.items() if key not in OURS}
    return SoftTokens(
        tensors["tokens"],
        row,
        parsed,
        time_table=tensors.get("time_table"),
        negative_tokens=tensors.get("negative_tokens"),
        metadata=kept,
        name=name,
        splice=metadata.get(SPLICE),
    )


def _published_blocks(family: Family, shape: tuple[int, ...]) -> Blocks:
    return family.published_blocks or (shape[0] if shape else 0)


def summary(tokens: SoftTokens) -> list[str]:
    """Lines that describe a file: what it is, where it acts, how large its vectors are."""
    lines = [
        f"family      {tokens.family.name} ({tokens.family.title})",
        f"tokens      {list(tokens.tokens.shape)}, mean norm {tokens.tokens.norm(dim=-1).mean():.4g}",
        f"blocks      {format_blocks(tokens.blocks)} ({where(tokens.blocks)})",
    ]
    if tokens.time_table is None:
        lines.append("time table  none: static tokens, the same at every timestep")
    else:
        rows = tokens.time_table.unflatten(1, (tokens.layers, -1))
        lines.append(f"time table  {list(tokens.time_table.shape)}, mean norm {rows.norm(dim=-1).mean():.4g}")
    if tokens.splice is not None:
        lines.append(f"padding     the tokens take its place in the text, {tokens.splice}")
    if tokens.negative_tokens is not None:
        lines.append(f"negative    a second bank, mean norm {tokens.negative_tokens.norm(dim=-1).mean():.4g}")
    texts = [f"{shown(key, 80):11} {shown(text, SHOWN_TEXT)}" for key, text in sorted(tokens.metadata.items())]
    more = [f"... and {len(texts) - SHOWN_TEXTS} more"] if len(texts) > SHOWN_TEXTS else []
    return lines + texts[:SHOWN_TEXTS] + more
