"""Which images a folder holds and which captions they have, in every layout that is known here.

Captions stand beside the image, in tables, in shards or in the name of the folder; an image has those of all sources
together, and the folder's name where there is none.
"""

import gc
import os
import posixpath
import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..files import is_file
from .left_out import LeftOut
from .sources import Part, Source, WholeFile, tar_members
from .tables import TABLES, BadTable, Layout, Row, bounded, is_text, json_captions, layout_of, text_captions

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".jxl", ".jp2")
OTHER_SUFFIXES = (".bmp", ".tif", ".tiff", ".gif", ".tga", ".ppm")
IMAGE_SUFFIXES = frozenset(PHOTO_SUFFIXES + OTHER_SUFFIXES)
"""Files with these names are opened or, where PIL knows no way, reported."""

TEXT_SUFFIXES = (".txt", ".caption")
SHARD_SUFFIX = ".tar"
COMPRESSED_SHARDS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
CAPTION_FOLDER, IMAGE_FOLDER = "captions", "images"
REPEATS = re.compile(r"([1-9]\d{0,2})_(.+)")
"""A folder's name as kohya reads it: how often its images count, and what they show."""

FOREIGN = re.compile(r"/|[A-Za-z]:/")
"""How paths of a machine start, as against those relative to a table."""

EACH, WHOLE = CAPTION_LINES = ("each", "whole")
"""What is a caption in a text file: every line, or the whole text."""

LOOKED_FOR = (
    "a.txt, a.caption, a.jpg.txt or a.json beside a.jpg",
    f"a.txt in {CAPTION_FOLDER} for a.jpg in {IMAGE_FOLDER}",
    "a folder named 10_caption",
    f"WebDataset *{SHARD_SUFFIX}",
    *(layout.title for layout in TABLES),
)
"""The layouts, as a message lists them."""

JSON_TABLES = ", ".join(layout.title for layout in TABLES if layout.title.endswith(".json"))


@dataclass
class Listing:
    """Images by their name, the path below the folder with forward slashes, sorted; and what was left out."""

    sources: dict[str, Source] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    captioned_by_folder: set[str] = field(default_factory=set)
    """Images with no caption but the name of their folder."""
    several_lines: int = 0
    """Text files of which every line is a caption, with more than one."""

    def add(self, name: str, captions: list[str]) -> None:
        known = self.captions.setdefault(name, [])
        known += [caption for caption in dict.fromkeys(captions) if caption not in known]


@contextmanager
def without_collector() -> Iterator[None]:
    """The collector would go through every caption again and again, and they are in no cycle."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@without_collector()
def list_folder(root: Path, caption_lines: str = EACH, tick: Callable[[], object] = lambda: None) -> Listing:
    """All images below `root` that have captions. `tick` is called for every file and row; it may raise to stop."""
    listing, tables, beside = Listing(), [], []
    folders = dict(folders_in(root, lambda error: _leave_out_folder(root, error, listing.left_out)))
    for name, source in _files(root, folders, listing.left_out):
        tick()
        suffix = posixpath.splitext(name)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            listing.sources[name] = source
        elif suffix in TEXT_SUFFIXES or suffix == ".json":
            beside.append((name, source))
        elif layout := layout_of(posixpath.basename(name)):
            tables.append((name, source, layout))
    images = _by_stem(listing.sources)
    for name, source in beside:
        tick()
        stem = posixpath.splitext(name)[0]
        found = images.get(stem) or images.get(_image_folder(stem), [])
        if found:
            _read_beside(listing, name, source, found, caption_lines)
        elif layout := layout_of(posixpath.basename(name)):
            tables.append((name, source, layout))
        elif name.lower().endswith(".json"):
            listing.left_out.add(name, f"no image of this name, and no name of a table ({JSON_TABLES})")
        else:
            listing.left_out.add(name, "no image of this name")
    if tables:
        captioned = {name for name in listing.sources if listing.captions.get(name) or repeats_of(root, name)}
        _read_tables(listing, _Lookup(root, folders, listing.sources, captioned), tables, tick)
    for name in sorted(listing.sources):
        if not listing.captions.get(name) and (folder := repeats_of(root, name)):
            listing.add(name, [folder[1]])
            listing.captioned_by_folder.add(name)
        if not listing.captions.get(name):
            del listing.sources[name]
            listing.left_out.add(name, "no caption")
    listing.sources = dict(sorted(listing.sources.items()))
    return listing


def folders_in(root: Path, on_error: Callable[[OSError], object] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """`root` and every folder below it, with the names of its files.

    Hidden ones are passed over, linked folders are entered once; `on_error` hears of those that cannot be listed.
    """
    entered = set()
    for folder, folders, files in os.walk(root, onerror=on_error, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), [name for name in files if not name.startswith(".")]


def may_hold_images(file_name: str) -> bool:
    """By its name alone: an image, or what images are packed in."""
    return posixpath.splitext(file_name)[1].lower() in (*IMAGE_SUFFIXES, SHARD_SUFFIX, ".parquet")


def name_in(root: Path, path: Path) -> str:
    """The path below `root` with forward slashes."""
    return composed(path.relative_to(root).as_posix())


def composed(name: str) -> str:
    """One form for what looks the same: macOS may list the accents of a name apart."""
    return unicodedata.normalize("NFC", name)


def repeats_of(root: Path, name: str) -> tuple[int, str] | None:
    """How often an image counts, and its folder's caption, where the folder is named 10_caption."""
    folder = name.rpartition("/")[0].rpartition("/")[2] or root.name
    found = REPEATS.fullmatch(folder)
    return (int(found[1]), found[2].strip()) if found and found[2].strip() else None


def _files(root: Path, folders: dict[Path, list[str]], left_out: LeftOut) -> Iterator[tuple[str, Source]]:
    """By name: regular files whose names are text, those in shards among them."""
    paths: list[tuple[str, Path]] = []
    for folder, names in folders.items():
        inside = name_in(root, folder)
        paths += [(posixpath.normpath(f"{inside}/{composed(name)}"), folder / name) for name in names]
    counts = Counter([name for name, _ in paths] + [name_in(root, folder) for folder in folders])
    twins = {name for name, count in counts.items() if count > 1}
    for name, path in sorted(paths):
        suffix = posixpath.splitext(name)[1].lower()
        if not is_text(name):
            left_out.add(name, "its name is no text that can be written")
        elif twins and not twins.isdisjoint((name, *map(str, PurePosixPath(name).parents))):
            left_out.add(name, "its name looks like another's, with accents composed and apart")
        elif not is_file(path):
            if suffix in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES, SHARD_SUFFIX) or layout_of(path.name):
                left_out.add(name, "no regular file that may be looked at")
        elif name.lower().endswith(COMPRESSED_SHARDS):
            left_out.add(name, f"a compressed archive, expected {SHARD_SUFFIX}")
        elif suffix != SHARD_SUFFIX:
            yield name, WholeFile(path)
        else:
            yield from _members(name, path, left_out).items()


def _members(shard: str, path: Path, left_out: LeftOut) -> dict[str, Source]:
    """Of a shard, by name: of two of one name the last one counts, as whoever appends to a .tar means it."""
    members: dict[str, Source] = {}
    try:
        for inside, part in tar_members(path):
            if is_text(inside) and not posixpath.basename(inside).startswith("."):
                members[f"{shard}/{posixpath.normpath(composed(inside))}"] = part
    except OSError as error:
        left_out.add(shard, reason_of(error))
    return members


def _leave_out_folder(root: Path, error: OSError, left_out: LeftOut) -> None:
    left_out.add(name_in(root, Path(error.filename)), reason_of(error))


def reason_of(error: OSError) -> str:
    return error.strerror or str(error)


def _by_stem(sources: dict[str, Source]) -> dict[str, list[str]]:
    """Images by path without suffix, and by the whole of it, which comes first: a.jpg.txt belongs to a.jpg.

    In a shard also by what is before the first dot, which is WebDataset's key: a.txt belongs to a.img.jpg.
    """
    images: dict[str, list[str]] = {}
    for name, source in sources.items():
        folder, last = posixpath.split(name)
        keys = [posixpath.splitext(name)[0]]
        if isinstance(source, Part):
            keys.append(posixpath.join(folder, last.partition(".")[0]))
        for key in dict.fromkeys(keys):
            images.setdefault(key, []).append(name)
    return images | {name: [name] for name in sources}


def _image_folder(stem: str) -> str:
    """Where the image lies of which `stem` is a caption in a folder of captions."""
    folders, last = posixpath.split(stem)
    parts = folders.split("/")
    for place in reversed(range(len(parts))):
        if parts[place] == CAPTION_FOLDER:
            return posixpath.join(*parts[:place], IMAGE_FOLDER, *parts[place + 1 :], last)
    return ""


def _read_beside(listing: Listing, name: str, source: Source, images: list[str], caption_lines: str) -> None:
    is_json = name.lower().endswith(".json")
    try:
        captions = json_captions(source) if is_json else text_captions(source, caption_lines == WHOLE)
    except OSError as error:
        listing.left_out.add(name, f"cannot be read ({reason_of(error)})")
        return
    except BadTable as problem:
        listing.left_out.add(name, str(problem))
        return
    if not captions and not is_json:
        listing.left_out.add(name, "empty")
    listing.several_lines += len(captions) > 1 and not is_json
    for image in images:
        listing.add(image, captions)


def _read_tables(
    listing: Listing, lookup: "_Lookup", tables: list[tuple[str, Source, Layout]], tick: Callable[[], object]
) -> None:
    rows = [(name, row) for name, source, layout in tables for row in _rows(listing, name, source, layout, tick)]
    images = lookup.find_all([_Wanted(name, row.reference, row.is_apart) for name, row in rows])
    for (name, row), image in zip(rows, images, strict=True):
        if not row.captions:
            listing.left_out.add(row.reference, f"no caption in {name}")
        elif image is None:
            listing.left_out.add(row.reference, f"no file, or several, for a row of {name}")
        else:
            listing.add(image, row.captions)


def _rows(listing: Listing, name: str, source: Source, layout: Layout, tick: Callable[[], object]) -> Iterator[Row]:
    """The rows that name files; images that the table itself holds are added to the listing."""
    try:
        for row in bounded(layout.rows(source)):
            tick()
            if not isinstance(row, Row):
                listing.left_out.add(row.place, f"{row.reason} in {name}")
            elif row.image is None:
                yield row
            else:
                image = f"{name}/{row.image.group}.{row.image.row:06}"
                listing.sources[image] = row.image
                listing.add(image, row.captions)
    except OSError as error:
        listing.left_out.add(name, reason_of(error))
    except BadTable as problem:
        listing.left_out.add(name, str(problem))


class _Wanted(NamedTuple):
    """A file as a row names it, the table, and whether the table may stand apart from its images."""

    table: str
    reference: str
    is_apart: bool


def _normal(row: _Wanted) -> _Wanted:
    return row._replace(reference=composed(row.reference.replace("\\", "/")).removeprefix("./"))


class _Lookup:
    """Finds the image a row means: the file of that name, relative to the table.

    Where a table finds no file so, its rows are guessed; but no image is guessed that another row names exactly, that
    has captions from elsewhere, or that two tables or two rows that differ would get. In doubt a row means none.

    All paths here begin with the name of the root, for a path of another machine may hold it.
    """

    def __init__(self, root: Path, folders: Iterable[Path], images: Iterable[str], captioned: set[str]):
        """`captioned` are the images that have captions without any table."""
        self.root = composed(root.absolute().as_posix())
        self.top = posixpath.basename(self.root)
        self.captioned = {self._below_top(name) for name in captioned}
        self.folders = {self._below_top(name_in(root, folder)) for folder in folders}
        self.folder_ends = {end for folder in self.folders for end in _ends(folder)}
        self.exact: dict[str, list[str]] = {}
        self.by_end: dict[str, list[str]] = {}
        self.with_images: set[str] = set()
        """Folders with images right in them."""
        for name in sorted(map(self._below_top, images)):
            self.with_images.add(posixpath.dirname(name))
            for whole in (name, posixpath.splitext(name)[0]):
                if whole != name and _is_image(whole):
                    continue  # a row that says a.jpg does not mean a.jpg.png
                self.exact.setdefault(whole, []).append(name)
                for end in _ends(whole):
                    self.by_end.setdefault(end, []).append(name)
        self.holding = {str(folder) for name in self.with_images for folder in (name, *PurePosixPath(name).parents)}
        """Folders with images in or below them."""

    def find_all(self, rows: list[_Wanted]) -> list[str | None]:
        """The image of each row, or None."""
        meant = {row: _normal(row) for row in dict.fromkeys(rows)}  # an image may have many rows
        exact = {row: self._exactly(row) for row in dict.fromkeys(meant.values())}
        taken = self.captioned.union(filter(None, exact.values()))
        in_place = {row.table for row, image in exact.items() if image}
        guesses = {row: self._guess(row) for row in exact if row.table not in in_place}
        claims = Counter(guesses.values())
        certain = {row: image for row, image in guesses.items() if image not in taken and claims[image] == 1}
        found = {row: image or certain.get(row) for row, image in exact.items()}
        below = {row: image and image.removeprefix(f"{self.top}/") for row, image in found.items()}
        return [below[meant[row]] for row in rows]

    def _below_top(self, name: str) -> str:
        return posixpath.normpath(f"{self.top}/{name}")

    def _exactly(self, row: _Wanted) -> str | None:
        if row.reference.startswith(f"{self.root}/"):
            path = posixpath.relpath(row.reference, self.root)
        elif FOREIGN.match(row.reference):
            return None
        else:
            path = posixpath.join(posixpath.dirname(row.table), row.reference)
        return _only(self.exact.get(self._below_top(path), []))

    def _guess(self, row: _Wanted) -> str | None:
        """The only image that the row can mean if table or images were moved.

        A bare name, of a layout whose table stands apart, means an image below the table's folder, unless images lie
        right in there. A path of another machine means the image below the table's folder whose path ends like it for
        the longest stretch, the last folder at least. Any other path starts in the folder above the table, if it names
        the table's folder or that is without images. Without images there, "below the table's folder" is below the
        folder above it for bare names, and right in that folder for paths.
        """
        folder = posixpath.dirname(self._below_top(row.table))
        above, is_alone = posixpath.dirname(folder), folder not in self.holding
        home = above if is_alone else folder
        parts = [part for part in row.reference.split("/") if part not in ("", ".")]
        is_foreign = FOREIGN.match(row.reference) is not None
        if len(parts) == 1:
            fits = row.is_apart and not is_foreign and folder not in self.with_images
            return _only(self._ending(home, parts[0])) if fits else None
        if not is_foreign and posixpath.join(folder, *parts[:-1]) in self.folders:
            return None  # the folder is here, the file is not
        for place in range(len(parts) - 1 if is_foreign else 1):
            end = "/".join(parts[place:])
            is_anywhere = is_foreign and not is_alone
            names = self._ending(home, end) if is_anywhere else self.exact.get(posixpath.join(above, end), [])
            if names := [name for name in names if name.startswith(f"{home}/")]:
                return _only(names)
            if posixpath.dirname(end) in self.folder_ends:
                return None  # as above
        return None

    def _ending(self, home: str, end: str) -> list[str]:
        """Images below a folder whose paths end so; two stand for all."""
        names = self.by_end.get(end, [])
        first, last = bisect_left(names, f"{home}/"), bisect_left(names, f"{home}0")  # 0 comes next to a slash
        return names[first : min(last, first + 2)]


def _ends(path: str) -> list[str]:
    """a/b/c, b/c and c."""
    parts = path.split("/")
    return ["/".join(parts[place:]) for place in range(len(parts))]


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None
