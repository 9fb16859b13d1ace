"""A folder of captioned images as examples: what each file holds, its training size, and what a person should know."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

from torch import Tensor

from ..errors import SoftREPAError, shown
from ..files import read_bounded, write_atomically
from .batches import Example
from .buckets import Size, bucket_sizes, join_small, nearest
from .captions import EACH, LOOKED_FOR, Listing, list_folder, repeats_of
from .dataset import DamagedImageError, UnusableImageError, divide, named_examples
from .images import UNREADABLE, prepared, upright_size
from .sources import SMALL, Cell, Source, WholeFile, digests, identity, release, stamp

Tick = Callable[[int, int], None]
"""Called with how many files are done, of how many, 0 while they are listed; may raise to stop."""

MOST_IMAGE = 2**30
MOST_INDEX = 2**30
"""Bytes of an image file, and of an index."""
MOST_SIDE = 2**31
"""Pixels of an image as an index may tell them: no format that PIL reads has more."""
IN_A_ROW, MOST_THREADS = 64, 8
"""Files that a thread looks at in one go, and threads: each may hold a decoded picture."""
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ImageFile:
    """What is known of a file: its `identity`, its size as seen, or why it cannot be used; its digest once needed."""

    identity: str
    size: Size
    problem: str = ""
    digest: str = ""


@dataclass
class Index:
    """What is known of a folder's files, by name and with the stamp of each, kept in the file `path`.

    A file whose stamp has changed is as unknown.
    """

    path: Path
    files: dict[str, tuple[list, ImageFile]] = field(default_factory=dict)
    is_changed: bool = False

    @classmethod
    def read(cls, path: Path) -> "Index":
        """What is not as `write` leaves it counts as absent."""
        try:
            content = json.loads(read_bounded(path, MOST_INDEX))
        except (OSError, ValueError, RecursionError):
            content = None
        files = content.get("files") if isinstance(content, dict) else None
        entries = {name: _entry(value) for name, value in files.items()} if isinstance(files, dict) else {}
        return cls(path, {name: entry for name, entry in entries.items() if entry})

    def get(self, name: str, mark: list) -> ImageFile | None:
        old, file = self.files.get(name, (None, None))
        return file if old == mark else None

    def set(self, name: str, mark: list, file: ImageFile) -> None:
        self.files[name] = (mark, file)
        self.is_changed = True

    def write(self) -> None:
        """Without it everything is read again: a disk that is full costs no more than that."""
        if not self.is_changed:
            return
        files = {
            name: [mark, file.identity, file.size, file.problem, file.digest]
            for name, (mark, file) in self.files.items()
        }
        content = json.dumps({"files": files})
        try:
            write_atomically(self.path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
            self.is_changed = False
        except OSError as error:
            logging.warning("SoftREPA: %s cannot be written (%s)", self.path, error)


@dataclass
class ImageFolder:
    """The examples of a folder, where their files are, and lines for the person."""

    name: str
    sources: dict[str, Source]
    train: list[Example]
    validation: list[Example]
    notes: list[str]
    index: Index
    is_outdated: bool = False
    """An image turned out to be unusable: whoever reads the folder again gets it without."""

    def pixels(self, example: Example) -> Tensor:
        """(height, width, 3) float32 in 0..1 at the training size. Raises UnusableImageError, DamagedImageError."""
        data = self._content(example)
        try:
            return prepared(data, example.size)
        except UNREADABLE as error:
            mark, file = self.index.files[example.name]
            self.index.set(example.name, mark, replace(file, problem=_reason(error)))
            raise self._unusable(example, _reason(error), DamagedImageError) from None

    def digest(self, example: Example) -> str:
        """That of the whole file. Read when it is first asked for, then kept. Raises UnusableImageError."""
        if not self.known_digest(example):
            self._content(example)
        return self.known_digest(example)

    def known_digest(self, example: Example) -> str:
        """Empty where the file would have to be read."""
        return self.index.files[example.name][1].digest

    def finish(self) -> None:
        """Keeps what was learned, and lets go what was held to learn it."""
        self.index.write()
        release()

    def _content(self, example: Example) -> bytes:
        mark, file = self.index.files[example.name]
        try:
            data = self.sources[example.name].read(MOST_IMAGE)
        except OSError as error:
            raise self._unusable(example, _reason(error)) from None
        found, digest = digests(data)
        if digest != (file.digest or digest) or found != file.identity:
            raise self._unusable(example, "its content has changed")
        if not file.digest:
            self.index.set(example.name, mark, replace(file, digest=digest))
        return data

    def _unusable(self, example: Example, reason: str, kind=UnusableImageError) -> UnusableImageError:
        self.is_outdated = True
        return kind(
            f'Dataset "{shown(self.name)}": {shown(example.name)} cannot be used any more ({reason}), '
            "expected the image that was there when the dataset was read; run again to read the folder anew."
        )


def read_folder(
    root: Path,
    name: str,
    resolution: int,
    bucketing: bool,
    validation_percent: float,
    index: Path,
    tick: Tick = lambda done, total: None,
    caption_lines: str = EACH,
) -> ImageFolder:
    """Every captioned image below `root`. Of a file that `index` does not know, SMALL bytes or the head are read."""
    listing = list_folder(root, caption_lines, lambda: tick(0, 0))
    known = _inspected(listing.sources, index, tick)
    examples = []
    sizes = bucket_sizes(resolution) if bucketing else [(resolution, resolution)]
    for image in listing.sources:
        file = known.files[image][1]
        if file.problem:
            listing.left_out.add(image, file.problem)
        else:
            repeats, _ = repeats_of(root, image) or (1, "")
            captions = tuple(listing.captions[image])
            examples.append(Example(image, file.identity, captions, nearest(file.size, sizes), repeats))
    if not examples:
        raise SoftREPAError(
            f'folder "{shown(name)}" has no captioned image ({listing.left_out.told() or "it is empty"}), looked for '
            f"{'; '.join(LOOKED_FOR)}."
        )
    train, validation = divide(examples, validation_percent)
    if bucketing:
        train, validation = (join_small(part) for part in (train, validation))
    return ImageFolder(
        name, listing.sources, train, validation, _notes(train + validation, known, listing, caption_lines), known
    )


def _inspected(sources: dict[str, Source], index: Path, tick: Tick) -> Index:
    """What is known of these files, and of no others."""
    before, now = Index.read(index), Index(index)
    try:
        for done, (name, mark, file) in enumerate(_looked_at(sources, before)):
            tick(done, len(sources))
            now.set(name, mark, file)
    finally:  # when stopped halfway too
        now.is_changed = now.files != before.files
        now.write()
        release()
    return now


def _looked_at(sources: dict[str, Source], before: Index) -> Iterator[tuple[str, list, ImageFile]]:
    """Name, stamp and what is known of each, in order. PIL and digests leave the other cores to other threads."""
    names = list(sources)
    rows = [names[start : start + IN_A_ROW] for start in range(0, len(names), IN_A_ROW)]
    is_in_order = any(isinstance(source, Cell) for source in sources.values())  # a cell lies behind those before it
    with ThreadPoolExecutor(1 if is_in_order else min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for found in pool.map(lambda row: [(name, *_look(name, sources[name], before)) for name in row], rows):
            yield from found


def _look(name: str, source: Source, before: Index) -> tuple[list, ImageFile]:
    try:
        mark = stamp(source)
        return mark, before.get(name, mark) or _inspect(source)
    except OSError as error:
        return [], ImageFile("", (0, 0), _reason(error))


def _inspect(source: Source) -> ImageFile:
    """Raises OSError where the file cannot be read, which is not remembered."""
    if isinstance(source, WholeFile) and SMALL < (length := source.path.stat().st_size) <= MOST_IMAGE:
        with source.path.open("rb") as file:
            found = identity(file, length)
            file.seek(0)
            return ImageFile(found, *_size(lambda: upright_size(file, whole=False)))
    data = source.read(MOST_IMAGE)
    found, digest = digests(data)
    return ImageFile(found, *_size(lambda: upright_size(BytesIO(data), whole=True)), digest)


def _size(look: Callable[[], Size]) -> tuple[Size, str]:
    """The size, or why there is none."""
    try:
        return look(), ""
    except UNREADABLE as error:
        return (0, 0), _reason(error)


def _entry(value: object) -> tuple[list, ImageFile] | None:
    """One of the index, if it is such as `write` leaves: an image that can be used, or why it cannot."""
    match value:
        case [list() as mark, str() as found, [int() as width, int() as height], str() as problem, str() as digest]:
            is_usable = all(type(side) is int and 1 <= side <= MOST_SIDE for side in (width, height))
            if (problem or (is_usable and DIGEST.fullmatch(found))) and (not digest or DIGEST.fullmatch(digest)):
                return mark, ImageFile(found, (width, height), problem, digest)
    return None


def _reason(error: BaseException) -> str:
    """In the words of whoever raised it, without numbers, so that alike reasons are one.

    PIL names the memory it read from when it knows no such format.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if "cannot identify image file" in text:
        return "no image that can be opened"
    return shown(re.sub(r" \([^)]*\d[^)]*\)", "", text) or type(error).__name__)


def _notes(examples: list[Example], known: Index, listing: Listing, caption_lines: str) -> list[str]:
    originals = [known.files[one.name][1].size for one in examples]
    least, most = (pick(originals, key=lambda size: size[0] * size[1]) for pick in (min, max))
    notes = [f"originals from {least[0]}x{least[1]} to {most[0]}x{most[1]}"]
    pairs = zip(examples, originals, strict=True)
    enlarged = [one.name for one, size in pairs if size[0] < one.size[0] or size[1] < one.size[1]]
    if enlarged:
        notes.append(f"{len(enlarged)} are enlarged: {named_examples(enlarged)}")
    by_folder = [one for one in examples if one.name in listing.captioned_by_folder]
    if by_folder:
        names = dict.fromkeys(f'"{shown(one.captions[0])}" (drawn {one.repeats} times)' for one in by_folder)
        notes.append(f"{len(by_folder)} have the name of their folder as caption: {named_examples(list(names))}")
    if listing.several_lines and caption_lines == EACH:
        notes.append(
            f"{listing.several_lines} text files have several lines, each of them a caption: "
            "set caption_lines to whole if they are one text"
        )
    left_out = listing.left_out.told()
    return [left_out, *notes] if left_out else notes
