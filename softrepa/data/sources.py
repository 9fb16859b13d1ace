"""Where the bytes of an image or a caption lie: in a file of its own, in a .tar shard, or in a cell of a parquet file.

Only what is asked for is read; a shard is never held as a whole.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO

from ..files import UnreadableError, read_bounded

BLOCK, BLOCKS = 2**16, 16
SMALL = BLOCK * BLOCKS
"""Bytes: a file up to this length is known by all of them, a longer one by BLOCKS blocks."""

MOST_ROW_GROUP = 2**31
"""Bytes of the images in one row group of a parquet file: it is decompressed as a whole."""

BROKEN_TAR = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError)
"""What the tarfile module raises on damaged archives."""


@dataclass(frozen=True)
class WholeFile:
    """A file."""

    path: Path

    def read(self, most: int) -> bytes:
        return read_bounded(self.path, most)


@dataclass(frozen=True)
class Part:
    """`length` bytes of a file, from `offset` on: a member of a .tar shard."""

    path: Path
    offset: int
    length: int

    def read(self, most: int) -> bytes:
        if self.length > most:
            raise UnreadableError(f"{self.length:,} bytes, expected at most {most:,}")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclass(frozen=True)
class Cell:
    """The bytes in a row of a parquet file: `row` counts in its row group, `column` is as pyarrow names it."""

    path: Path
    group: int
    row: int
    column: str

    def read(self, most: int) -> bytes:
        facts = self.path.stat()
        content = _row_group(self.path, facts.st_mtime_ns, facts.st_size, self.group, self.column)[self.row].as_py()
        if isinstance(content, dict):
            content = content.get("bytes")
        if content is None or len(content) > most:
            raise UnreadableError("no image in it" if content is None else f"more than {most:,} bytes")
        return content


Source = WholeFile | Part | Cell


def stamp(source: Source) -> list:
    """What changes with a file that is written, replaced or exchanged, without reading it; and the place inside it."""
    return [*file_stamp(source.path.stat()), *astuple(source)[1:]]


def file_stamp(facts: os.stat_result) -> list[int]:
    """Length, dates of content and of status, inode: two files exchanged under one date differ in the last two."""
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def identity(file: IO[bytes], length: int) -> str:
    """The digest of a file up to SMALL bytes; of a longer one that of its length and of blocks all over it.

    Longer ones that differ between the blocks alone count as copies of each other. Compressed images never do so.
    """
    if length <= SMALL:
        return hashlib.sha256(file.read()).hexdigest()
    digest = hashlib.sha256(str(length).encode())
    for number in range(BLOCKS):
        file.seek(number * (length - BLOCK) // (BLOCKS - 1))
        digest.update(file.read(BLOCK))
    return digest.hexdigest()


def identity_of(data: bytes) -> str:
    """`identity` of a file with this content."""
    return identity(BytesIO(data), len(data))


def tar_members(path: Path) -> Iterator[tuple[str, Part]]:
    """The files in an uncompressed .tar and where they lie. Raises UnreadableError where it is damaged."""
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            end = 0
            while (member := archive.next()) is not None:
                if member.offset < end:  # a crafted length leads back, and round for ever
                    raise tarfile.ReadError("members overlap")
                end = member.offset_data + max(0, member.size)
                archive.members.clear()  # type: ignore[attr-defined] # they would pile up
                if member.isreg() and not member.issparse():
                    yield member.name, Part(path, member.offset_data, member.size)
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # it would stop in silence
                raise tarfile.ReadError("a header is damaged")
    except BROKEN_TAR as error:
        raise UnreadableError(f"a .tar that cannot be read to its end ({error})") from None


@contextmanager
def opened_parquet(path: Path) -> Iterator:
    """A pyarrow ParquetFile. Raises UnreadableError without pyarrow, and for whatever pyarrow finds wrong meanwhile."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UnreadableError("pyarrow is not installed") from None
    try:
        with ParquetFile(path) as file:
            yield file
    except UnreadableError:
        raise
    except (ArrowException, OSError, ValueError) as error:
        raise UnreadableError(f"not a parquet file that can be read ({error})") from None


@lru_cache(maxsize=1)
def _row_group(path: Path, _mtime: int, _size: int, group: int, column: str):
    """One is kept: rows are mostly read in order. `release` lets it go."""
    with opened_parquet(path) as file:
        chunks = file.metadata.row_group(group)
        parts = [chunks.column(number) for number in range(chunks.num_columns)]
        size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema == column)
        if size > MOST_ROW_GROUP:
            raise UnreadableError(f"a row group of {size:,} bytes, expected at most {MOST_ROW_GROUP:,}")
        return file.read_row_group(group, columns=[column]).column(0)


def release() -> None:
    """Frees the memory of what was read of parquet files."""
    _row_group.cache_clear()
