"""Encodings on disk: entries under keys, many to a file, in a folder that stays below a number of bytes.

A shard is a .safetensors file. Each of its tensors is the bytes of one entry, a small .safetensors of its own with a
checksum. An index is not kept: the heads of the shards are it. Each process writes shards of its own.
"""

import hashlib
import json
import os
import posixpath
import secrets
import stat
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from ..files import MOST_HEADER, UnreadableError, write_atomically

MOST_ENTRY = 2**30
"""Bytes of an entry."""

SHARD = 2**27
"""Bytes that wait until a shard is written."""
SHARD_ENTRIES = 4096
"""Entries of a shard, so that its head stays below MOST_HEADER."""
HEAD = 100
"""Bytes that an entry takes in the head of its shard, beside its name."""
SHARD_PREFIX = "shard-"
SUFFIX = ".safetensors"

CHECKSUM = "sha256"
"""Key in the metadata of an entry: the digest of the same tensors written without it."""


class Place(NamedTuple):
    """Where the bytes of an entry lie."""

    path: Path
    offset: int
    length: int


@dataclass
class Cache:
    """`limit` bytes at most for all that lies in `folder`. Keys are relative paths.

    What is written waits in memory until it makes a shard: `flush` writes it now. Others may write to the folder and
    delete in it meanwhile.
    """

    folder: Path
    limit: int
    used: int = 0
    """Bytes that lie there, as `survey` found and as was written since, with what waits."""
    _places: dict[str, Place] = field(default_factory=dict)
    _files: dict[Path, int] = field(default_factory=dict)
    """Bytes of the files whose entries are known."""
    _waiting: dict[str, "_Shard"] = field(default_factory=dict)
    """By folder what makes its next shard."""
    _older: deque[Path] = field(default_factory=deque)
    """What may be deleted for something new, the oldest first."""
    _older_bytes: int = 0

    def has(self, key: str) -> bool:
        return self._place(key) is not None or self._waits(key) is not None

    def read(self, key: str) -> dict[str, Tensor] | None:
        """None when it is not there. An entry that is not as it was written, or holds no numbers, is forgotten."""
        content = self._waits(key)
        if content is None and (place := self._place(key)):
            with suppress(OSError), place.path.open("rb") as file:
                file.seek(place.offset)
                content = file.read(place.length)
        tensors = None if content is None else _sound(content)
        if tensors is None:
            self.drop(key)
        return tensors

    def drop(self, key: str) -> None:
        """Forgets an entry that is of no use. Its bytes go with its file."""
        self._places.pop(key, None)

    def room(self) -> int:
        """Bytes that can still be written, with what would be deleted for them."""
        return self.limit - self.used + self._older_bytes

    def has_room(self, size: int) -> bool:
        return size <= self.room()

    def write(self, key: str, tensors: dict[str, Tensor]) -> bool:
        """At the cost of what was used longest ago; False, with nothing deleted, when there is no room.

        Raises OSError where a shard cannot be written: what waited for it is lost.
        """
        content = save(tensors, {CHECKSUM: _checksum(tensors)})
        folder, name = posixpath.split(key)
        size = len(content) + len(name) + HEAD
        if len(content) > MOST_ENTRY or not self.has_room(size):
            return False
        while self.used + size > self.limit:
            self._delete_oldest()
        shard = self._waiting.setdefault(folder, _Shard())
        shard.entries[name] = content
        shard.size += size
        self.used += size
        if len(shard.entries) >= SHARD_ENTRIES or shard.size >= SHARD:
            self._write_shard(folder)
        return True

    def flush(self) -> None:
        """Writes what waits. Raises OSError."""
        for folder in list(self._waiting):
            self._write_shard(folder)

    def survey(self, keep: Iterable[str]) -> None:
        """Looks at what lies there. `keep` are the keys that are wanted: of files that hold mostly such none is deleted
        for something new, and they count as used now. Files that hold nothing are the first to go.
        """
        wanted = set(keep)
        self._places, self._files = {}, {}
        useless: list[Path] = []
        older: list[Path] = []
        for path, facts in sorted(self._found(), key=lambda found: (found[1].st_mtime_ns, found[0])):
            places = self._entries(path, facts.st_size)
            asked = sum(place.length for key, place in places.items() if key in wanted)
            self._places |= places
            self._files[path] = facts.st_size
            if 2 * asked > facts.st_size:
                with suppress(OSError):  # another process deleted it just now
                    os.utime(path)
            else:
                (older if places else useless).append(path)
        self._older = deque(useless + older)
        self._older_bytes = sum(self._files[path] for path in self._older)
        self.used = sum(self._files.values()) + sum(shard.size for shard in self._waiting.values())

    def refresh(self) -> None:
        """Takes in what others have written and deleted since."""
        found = {path: facts.st_size for path, facts in self._found()}
        for path in self._files.keys() - found.keys():
            self.used -= self._files.pop(path)
        self._older = deque(path for path in self._older if path in self._files)
        self._older_bytes = sum(self._files[path] for path in self._older)
        for path in found.keys() - self._files.keys():
            self._places |= self._entries(path, found[path])
            self._files[path] = found[path]
            self.used += found[path]

    def _place(self, key: str) -> Place | None:
        place = self._places.get(key)
        return place if place and place.path in self._files else None

    def _waits(self, key: str) -> bytes | None:
        folder, _, name = key.rpartition("/")
        return self._waiting[folder].entries.get(name) if folder in self._waiting else None

    def _found(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder) / name for name in names if name.endswith(SUFFIX)):
                with suppress(OSError):  # another process deleted it just now
                    if stat.S_ISREG((facts := path.stat()).st_mode):  # opening a pipe would wait
                        yield path, facts

    def _entries(self, path: Path, size: int) -> dict[str, Place]:
        """By key; none of a file that is cut off, or no shard: earlier versions wrote a file for each entry."""
        try:
            places = _head(path, size) if path.name.startswith(SHARD_PREFIX) else {}
        except Exception:  # whatever the reader raises on what others wrote: it holds nothing
            return {}
        folder = path.parent.relative_to(self.folder).as_posix()
        return {posixpath.normpath(f"{folder}/{name}"): Place(path, *place) for name, place in places.items()}

    def _write_shard(self, folder: str) -> None:
        shard = self._waiting.pop(folder)
        self.used -= shard.size
        path = self.folder / folder / f"{SHARD_PREFIX}{time.time_ns():x}-{secrets.token_hex(4)}{SUFFIX}"
        head, places, end = {}, {}, 0
        for name, content in shard.entries.items():
            start, end = end, end + len(content)
            head[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [start, end]}
            places[name] = (start, len(content))
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.writelines(shard.entries.values())

        write_atomically(path, write)
        first = 8 + len(text)
        for name, (start, length) in places.items():
            self._places[posixpath.join(folder, name)] = Place(path, first + start, length)
        self._files[path] = first + end
        self.used += first + end

    def _delete_oldest(self) -> None:
        path = self._older.popleft()
        size = self._files.pop(path)
        self.used -= size
        self._older_bytes -= size
        _unlink(path)


@dataclass
class _Shard:
    """Entries by name, and the bytes they will take."""

    entries: dict[str, bytes] = field(default_factory=dict)
    size: int = 0


def _unlink(path: Path) -> None:
    with suppress(OSError):  # gone already, or open in another process
        path.unlink()


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()


def _head(path: Path, size: int) -> dict[str, tuple[int, int]]:
    """Where each entry of a whole shard begins and how long it is. Raises anything where it is not one."""
    with path.open("rb") as file:
        first = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < first <= 8 + MOST_HEADER:
            raise UnreadableError("no head")
        head = json.loads(file.read(first - 8))
    spans = {name: entry["data_offsets"] for name, entry in head.items()}
    if not all(type(at) is int for span in spans.values() for at in span) or not all(
        0 <= start <= end <= start + MOST_ENTRY for start, end in spans.values()
    ):
        raise UnreadableError("entries that cannot be")
    if size != first + max(end for _, end in spans.values()):
        raise UnreadableError("it is cut off")
    return {name: (first + start, end - start) for name, (start, end) in spans.items()}


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
