"""Encodings on disk: safetensors files under keys, in a folder that stays below a number of bytes."""

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .files import write_atomically

HEADER = 512
"""About what a file takes beside its tensors, in bytes."""


@dataclass
class Cache:
    """`limit` bytes at most for all that lies in `folder`. Keys are relative paths without suffix."""

    folder: Path
    limit: int
    room: int = 0
    """Bytes that may still be written; `make_room` sets it."""

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """None when it is not there. A damaged entry is deleted and makes room for its successor."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            return load(content)
        except SafetensorError:
            path.unlink(missing_ok=True)
            self.room += len(content) + HEADER
            return None

    def write(self, key: str, tensors: dict[str, Tensor]) -> bool:
        """False when there is no room left."""
        content = save(tensors)
        if len(content) > self.room:
            return False
        write_atomically(self.path(key), lambda temporary: temporary.write_bytes(content))
        self.room -= len(content)
        return True

    def make_room(self, needed: int, keep: set[str]) -> None:
        """Lets `needed` more bytes in, as far as `limit` allows, at the cost of what was used longest ago.

        What `keep` names stays and counts as used now. Nothing is deleted where nothing will be written.
        """
        needed = min(needed, self.limit)
        kept = {self.path(key) for key in keep}
        used, others = 0, []
        for path in self.folder.rglob("*.safetensors"):
            facts = path.stat()
            used += facts.st_size
            if path in kept:
                os.utime(path)
            else:
                others.append((facts.st_mtime_ns, facts.st_size, path))
        surplus = used + needed - self.limit if needed else 0
        for _, size, path in sorted(others):
            if surplus <= 0:
                break
            path.unlink(missing_ok=True)
            surplus -= size
            used -= size
        self.room = max(0, min(needed, self.limit - used))
