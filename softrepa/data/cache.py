"""Encodings on disk: safetensors files under keys, in a folder that stays below a number of bytes."""

import hashlib
import json
import os
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from ..files import MOST_HEADER, read_bounded, write_atomically

MOST_ENTRY = 2**30
"""Bytes of an entry."""

CHECKSUM = "sha256"
"""Key in the metadata of an entry: the digest of the same tensors written without it."""


@dataclass
class Cache:
    """`limit` bytes at most for all that lies in `folder`. Keys are relative paths without suffix.

    Others may write to the folder and delete in it meanwhile.
    """

    folder: Path
    limit: int
    used: int = 0
    """Bytes that lie there, as `survey` found and as was written since."""
    _older: deque[tuple[int, int, Path]] = field(default_factory=deque)
    """(date, bytes, path) of what may be deleted for something new, the oldest first."""
    _older_bytes: int = 0

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """None when it is not there. An entry that is not as it was written, or holds no numbers, is deleted."""
        path = self.path(key)
        try:
            content = read_bounded(path, MOST_ENTRY)
        except OSError:
            return None
        tensors = _sound(content)
        if tensors is None:
            self.drop(key)
        return tensors

    def drop(self, key: str) -> None:
        """Deletes an entry that is of no use."""
        with suppress(OSError):
            size = self.path(key).stat().st_size
            self.path(key).unlink()
            self.used -= size

    def has_room(self, size: int) -> bool:
        """For so many bytes more, with what would be deleted for them."""
        return self.used + size - self._older_bytes <= self.limit

    def write(self, key: str, tensors: dict[str, Tensor]) -> bool:
        """At the cost of what was used longest ago; False, with nothing deleted, when there is no room."""
        content = save(tensors, {CHECKSUM: _checksum(tensors)})
        if not self.has_room(len(content)):
            return False
        while self.used + len(content) > self.limit:
            _, size, path = self._older.popleft()
            self.used -= size
            self._older_bytes -= size
            with suppress(OSError):  # gone already, or open in another process
                path.unlink()
        write_atomically(self.path(key), lambda temporary: temporary.write_bytes(content))
        self.used += len(content)
        return True

    def survey(self, keep: set[str]) -> None:
        """Counts what lies there. What `keep` names is never deleted for something new, and counts as used now.

        Of that, entries that are cut off or of an older version are deleted: they would be found bad when they are
        drawn, long after.
        """
        kept = {self.path(key) for key in keep}
        self.used, older = 0, []
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder) / name for name in names if name.endswith(".safetensors")):
                with suppress(OSError):  # another process deleted it just now
                    if path in kept and not _has_sound_head(path):
                        path.unlink()
                    facts = path.stat()
                    self.used += facts.st_size
                    if path in kept:
                        os.utime(path)
                    else:
                        older.append((facts.st_mtime_ns, facts.st_size, path))
        self._older = deque(sorted(older))
        self._older_bytes = sum(size for _, size, _ in older)


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()


def _has_sound_head(path: Path) -> bool:
    """Whether an entry has a checksum and its whole length; its numbers are not read. Raises OSError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, MOST_HEADER)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return CHECKSUM in header["__metadata__"] and path.stat().st_size == 8 + length + max(ends)
        except Exception:  # as below
            return False


def _sound(content: bytes) -> dict[str, Tensor] | None:
    """The tensors of an entry that is as it was written."""
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        is_as_written = header["__metadata__"][CHECKSUM] == _checksum(tensors)
        if is_as_written and all(tensor.isfinite().all() for tensor in tensors.values()):
            return tensors
    except Exception:  # flipped bytes make the reader raise anything; whatever it is, the entry is made anew
        return None
    return None
