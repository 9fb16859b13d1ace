"""Where the bytes of an image or a caption lie: in a file of its own, in a .tar shard, or in a cell of a parquet file.

Only what is asked for is read; a shard is never held as a whole.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO

from ..files import UnreadableError, read_bounded

BLOCK, BLOCKS = 2**16, 16
SMALL = BLOCK * BLOCKS
"""Bytes: a file up to this length is known by all of them, a longer one by BLOCKS blocks."""

MOST_ROW_GROUP, MOST_UNPACKED = 2**31, 2**27
"""Bytes of a column in one row group of a parquet file; and if they are packed to less than a quarter."""
MOST_VALUES = 2**24
"""In such a column."""

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
            content = file.read(self.length)
        if len(content) < self.length:
            raise UnreadableError("it is cut off")
        return content


@dataclass(frozen=True)
class Cell:
    """The bytes in a row of a parquet file: `row` counts in its row group, `column` is as pyarrow names it."""

    path: Path
    group: int
    row: int
    column: str

    def read(self, most: int) -> bytes:
        facts = self.path.stat()
        column = _column(self.path, facts.st_mtime_ns, facts.st_size, self.group, self.column)
        try:
            cell = column.at(self.row)
        except UnreadableError:
            release()
            raise
        content = None if cell is None else cell.as_py()
        if isinstance(content, dict):
            content = content.get("bytes")
        if content is None or len(content) > most:
            raise UnreadableError("no image in it" if content is None else f"more than {most:,} bytes")
        return content


Source = WholeFile | Part | Cell


def stamp(source: Source) -> list:
    """What changes with a file that is written, replaced or exchanged, without reading it; and the place inside it."""
    facts = file_stamp(source.path.stat())
    if isinstance(source, WholeFile):
        return facts
    return facts + [getattr(source, one.name) for one in fields(source)[1:]]


def file_stamp(facts: os.stat_result) -> list[int]:
    """Length, dates of content and of status, inode: two files exchanged under one date differ in the last two."""
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def content_identity(source: Source, most: int) -> str:
    """The `identity` of what lies there, at most so many bytes."""
    if not isinstance(source, WholeFile):
        return digests(source.read(most))[0]
    with source.path.open("rb") as file:
        return identity(file, source.path.stat().st_size)


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


def digests(data: bytes) -> tuple[str, str]:
    """`identity` of a file with this content, and the digest of all of it."""
    whole = hashlib.sha256(data).hexdigest()
    return whole if len(data) <= SMALL else identity(BytesIO(data), len(data)), whole


def tar_members(path: Path) -> Iterator[tuple[str, Part]]:
    """The files in an uncompressed .tar and where they lie. Raises UnreadableError where it is damaged or cut off."""
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            end = 0
            while (member := archive.next()) is not None:
                if member.offset < end:  # a crafted length leads back, and round for ever
                    raise tarfile.ReadError("members overlap")
                end = member.offset_data + max(0, member.size)
                if end > length:
                    raise tarfile.ReadError("a member is cut off")
                archive.members.clear()  # type: ignore[attr-defined] # they would pile up
                if member.isreg() and not member.issparse():
                    yield member.name, Part(path, member.offset_data, member.size)
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # it would stop in silence
                raise tarfile.ReadError("a header is damaged")
    except BROKEN_TAR as error:
        raise UnreadableError(f"a .tar that cannot be read to its end ({error})") from None


@contextmanager
def opened_parquet(path: Path, dictionaries: Sequence[str] = ()) -> Iterator:
    """A pyarrow ParquetFile that is read page by page; equal texts of the columns `dictionaries` are held once.

    Raises UnreadableError without pyarrow, and for whatever pyarrow finds wrong meanwhile.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UnreadableError("pyarrow is not installed") from None
    try:
        with ParquetFile(path, read_dictionary=list(dictionaries), buffer_size=2**20) as file:
            yield file
    except UnreadableError:
        raise
    except (ArrowException, OSError, ValueError) as error:
        raise UnreadableError(f"not a parquet file that can be read ({error})") from None


def check_row_group(file, group: int, columns: Sequence[str]) -> None:
    """Raises UnreadableError where these columns of a ParquetFile would unpack to more than can be meant."""
    parts = file.metadata.row_group(group)
    for part in map(parts.column, range(parts.num_columns)):
        if part.path_in_schema.partition(".")[0] in columns:
            size = part.total_uncompressed_size
            if size > min(MOST_ROW_GROUP, max(MOST_UNPACKED, 4 * part.total_compressed_size)):
                raise UnreadableError(f"a row group of {size:,} bytes in {part.total_compressed_size:,} of the file")
            if part.num_values > MOST_VALUES:
                raise UnreadableError(f"a row group of {part.num_values:,} values, expected at most {MOST_VALUES:,}")


class _Column:
    """The cells of a column in one row group, of which one is held. Rows that lie back are read from the start."""

    def __init__(self, path: Path, group: int, column: str):
        self.place = path, group, column
        self.cells, self.count, self.last = self._cells(), 0, None

    def at(self, row: int):
        """As pyarrow has it, or None behind the last one. Raises UnreadableError."""
        if row < self.count - 1:
            self.cells, self.count = self._cells(), 0
        while self.count <= row:
            self.last = next(self.cells, None)
            self.count += 1
        return self.last

    def _cells(self) -> Iterator:
        path, group, column = self.place
        with opened_parquet(path) as file:
            check_row_group(file, group, [column.partition(".")[0]])
            for batch in file.iter_batches(batch_size=1, row_groups=[group], columns=[column]):
                yield batch.column(0)[0]


@lru_cache(maxsize=1)
def _column(path: Path, _mtime: int, _size: int, group: int, column: str) -> _Column:
    """One is kept: rows are mostly read in order. `release` lets it go."""
    return _Column(path, group, column)


def release() -> None:
    """Frees the memory of what was read of parquet files, and closes them."""
    _column.cache_clear()
