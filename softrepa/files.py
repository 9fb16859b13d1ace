"""Files from outside, read within bounds, and files of ours, which are there whole or not at all."""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


class UnreadableError(OSError):
    """Why a file from outside is not read, in a few words that fit into a sentence behind its name."""


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises UnreadableError for anything else: a pipe or a device would never end. Other OSErrors pass.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # opening a pipe would wait
    handle = os.open(path, flags)
    with os.fdopen(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise UnreadableError("no regular file")
        if facts.st_size > most:
            raise UnreadableError(f"{facts.st_size:,} bytes, expected at most {most:,}")
        content = file.read(most + 1)
    if len(content) > most:  # it grew meanwhile, or lies on a file system that tells no size
        raise UnreadableError(f"more than {most:,} bytes")
    return content


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file beside `path`, which then replaces it."""
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
    """A .safetensors file. Raises OSError on a full disk, which safetensors' own writer reports in words of its own."""
    content = save(tensors, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
