"""Files from outside, read within bounds, and files of ours, which are there whole or not at all."""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import printable

MOST_HEADER = 1 << 20
"""Bytes of a .safetensors file before its numbers. Each of them costs many when it is read."""
MOST_DIMENSIONS = 8


class UnreadableError(OSError):
    """Why a file from outside is not read, in a few words that fit into a sentence behind its name."""

    def __init__(self, reason: str):
        super().__init__(printable(reason))


def is_file(path: Path) -> bool:
    """Whether a regular file is there. Unlike Path's own, without an error for a name that no file can have."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """As `is_file`, of a folder."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises UnreadableError for anything else: a pipe or a device would never end. Other OSErrors pass; `errors.said`
    puts them into words.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # opening a pipe would wait
    try:
        handle = os.open(path, flags)
    except ValueError:  # a NUL, or a surrogate that stands for no byte
        raise UnreadableError("no name that a file can have") from None
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise UnreadableError("no regular file")
        if facts.st_size > most:
            raise UnreadableError(f"{facts.st_size:,} bytes, expected at most {most:,}")
        with open(handle, "rb", closefd=False) as file:
            content = file.read(facts.st_size + 1)
    finally:
        os.close(handle)
    if len(content) > facts.st_size:  # or it lies on a file system that tells no size
        raise UnreadableError("it grows while it is read")
    return content


def read_tensors(path: Path, most: int, most_header: int = MOST_HEADER) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, with no hold on the file.

    `most` bytes in all, `most_header` of them for names, shapes and metadata. Raises OSError, as `read_bounded`.
    """
    content = read_bounded(path, most)
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= len(content) - 8:
        raise UnreadableError("it is cut off, or no .safetensors file")
    if length > most_header:
        raise UnreadableError(f"a header of {length:,} bytes, expected at most {most_header:,}")
    header = parse_json(content[8 : 8 + length])
    entries = header.values() if isinstance(header, dict) else ()
    shapes = [entry.get("shape") for entry in entries if isinstance(entry, dict)]
    if any(isinstance(shape, list) and len(shape) > MOST_DIMENSIONS for shape in shapes):
        raise UnreadableError(f"a tensor of more than {MOST_DIMENSIONS} dimensions")
    try:
        return load(content), header.get("__metadata__") or {}
    except SafetensorError as error:
        raise UnreadableError(str(error)) from None
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError):  # what the loader takes for good
        raise UnreadableError("a tensor of a type or shape that PyTorch does not have") from None


def parse_json(content: bytes | str) -> Any:
    """What a JSON text says. Raises UnreadableError, whatever it holds."""
    try:
        return json.loads(content)
    except RecursionError:
        raise UnreadableError("JSON that is nested too deep") from None
    except ValueError as error:  # no JSON, no Unicode, a number of thousands of digits
        raise UnreadableError(f"no JSON: {error}") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file beside `path`, which then replaces it."""
    with contextlib.suppress(FileExistsError):  # a file, of which the next line says so
        path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A .safetensors file. Raises OSError on a full disk, which safetensors' own writer reports in words of its own.

    Metadata that cannot be encoded, such as the name of a folder, is written with escapes.
    """
    content = save(tensors, {printable(key): printable(text) for key, text in metadata.items()})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
