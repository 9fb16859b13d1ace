"""Which images a folder holds and which captions they have, in every layout that is known here.

Captions stand beside the image, in tables, in shards or in the name of the folder; an image has those of all sources
together, and the folder's name where there is none.
"""

import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass
class Listing:
    """Images by their name, the path below the folder with forward slashes, sorted; and what was left out."""

    sources: dict[str, Source] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    several_lines: int = 0
    """Text files of which every line is a caption, with more than one."""

    def add(self, name: str, captions: list[str]) -> None:
        known = self.captions.setdefault(name, [])
        known += [caption for caption in dict.fromkeys(captions) if caption not in known]


def list_folder(root: Path, caption_lines: str = EACH, tick: Callable[[], object] = lambda: None) -> Listing:
    """All images below `root` that have captions. `tick` is called for every file and row; it may raise to stop."""
    listing, tables, beside = Listing(), [], []
    folders = dict(folders_in(root))
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
        elif not name.lower().endswith(".json"):  # other .json files say other things
            listing.left_out.add(name, "no image of this name")
    if tables:
        _read_tables(listing, _Lookup(root, folders, listing.sources), tables, tick)
    for name in sorted(listing.sources):
        if not listing.captions.get(name) and (folder := repeats_of(root, name)):
            listing.add(name, [folder[1]])
        if not listing.captions.get(name):
            del listing.sources[name]
            listing.left_out.add(name, "no caption")
    listing.sources = dict(sorted(listing.sources.items()))
    return listing


def folders_in(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """`root` and every folder below it, with the names of its files.

    Hidden ones are passed over, linked folders are entered once.
    """
    entered = set()
    for folder, folders, files in os.walk(root, followlinks=True):
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
    folder = posixpath.basename(posixpath.dirname(name)) or root.name
    found = REPEATS.fullmatch(folder)
    return (int(found[1]), found[2].strip()) if found and found[2].strip() else None


def _files(root: Path, folders: dict[Path, list[str]], left_out: LeftOut) -> Iterator[tuple[str, Source]]:
    """By name: regular files whose names are text, those in shards among them."""
    paths: dict[str, Path] = {}
    for folder, names in folders.items():
        inside = name_in(root, folder)
        paths |= {posixpath.normpath(f"{inside}/{composed(name)}"): folder / name for name in names}
    for name, path in sorted(paths.items()):
        is_ours = path.suffix.lower() in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES, SHARD_SUFFIX) or layout_of(path.name)
        if not is_text(name):
            left_out.add(name, "its name is no text that can be written")
        elif not path.is_file():
            if is_ours:
                left_out.add(name, "no regular file")
        elif name.lower().endswith(COMPRESSED_SHARDS):
            left_out.add(name, f"a compressed archive, expected {SHARD_SUFFIX}")
        elif path.suffix.lower() != SHARD_SUFFIX:
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


def reason_of(error: OSError) -> str:
    return error.strerror or str(error)


def _by_stem(sources: dict[str, Source]) -> dict[str, list[str]]:
    """Images by path without suffix, and by the whole of it: a.txt and a.jpg.txt both belong to a.jpg.

    In a shard also by what is before the first dot, which is WebDataset's key: a.txt belongs to a.img.jpg.
    """
    images: dict[str, list[str]] = {}
    for name, source in sources.items():
        folder, last = posixpath.split(name)
        keys = [posixpath.splitext(name)[0], name]
        if isinstance(source, Part):
            keys.append(posixpath.join(folder, last.partition(".")[0]))
        for key in dict.fromkeys(keys):
            images.setdefault(key, []).append(name)
    return images


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
    images = lookup.find_all([(posixpath.dirname(name), row.reference) for name, row in rows])
    for (name, row), image in zip(rows, images, strict=True):
        if not row.captions:
            listing.left_out.add(row.reference, f"no caption in {name}")
        elif image is None:
            listing.left_out.add(row.reference, f"named in {name}, but no file here, or several")
        else:
            listing.add(image, row.captions)


def _rows(listing: Listing, name: str, source: Source, layout: Layout, tick: Callable[[], object]) -> Iterator[Row]:
    """The rows that name files; images that the table itself holds are added to the listing."""
    try:
        for row in bounded(layout.rows(source)):
            tick()
            if not isinstance(row, Row):
                listing.left_out.add(row.place, f"in {name}: {row.reason}")
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


class _Lookup:
    """Finds the image a row means.

    Tables name files with and without folder, with and without suffix, and with paths of the machine they were made on;
    COCO's stand beside the image folders. So where no file has the name that a row gives, relative to its table, the
    only one counts that ends like it - unless the folder that the row names is here, another row names that file
    exactly, or two rows that differ would get it: then the file of the row is gone.
    """

    def __init__(self, root: Path, folders: Iterable[Path], images: Iterable[str]):
        self.root = root.absolute().as_posix()
        self.exact: dict[str, list[str]] = {}
        self.by_end: dict[str, list[str]] = {}
        self.folder_ends = {end for folder in folders for end in _ends(name_in(root, folder))}
        for name in images:
            for whole in (name, posixpath.splitext(name)[0]):
                self.exact.setdefault(whole, []).append(name)
                for end in _ends(whole):
                    self.by_end.setdefault(end, []).append(name)

    def find_all(self, references: list[tuple[str, str]]) -> list[str | None]:
        """For (folder of the table, file as it says): the image, or None."""
        cleaned = [(table, self._cleaned(reference)) for table, reference in references]
        exact = [self._exactly(table, reference) for table, reference in cleaned]
        taken = {image for image in exact if image}
        pairs = list(zip(cleaned, exact, strict=True))
        relative = {table for (table, reference), image in pairs if image and "/" not in reference}
        guessed = [
            None if image or ("/" not in reference and table in relative) else self._by_end(reference)
            for (table, reference), image in pairs
        ]
        claims: dict[str | None, set[str]] = {}
        for (_, reference), image in zip(cleaned, guessed, strict=True):
            claims.setdefault(image, set()).add(reference)
        return [
            image or (guess if guess not in taken and len(claims[guess]) == 1 else None)
            for image, guess in zip(exact, guessed, strict=True)
        ]

    def _cleaned(self, reference: str) -> str:
        return composed(reference.replace("\\", "/")).removeprefix("./")

    def _exactly(self, table: str, reference: str) -> str | None:
        path = posixpath.normpath(posixpath.join(table, reference))
        if reference.startswith(f"{self.root}/"):
            path = posixpath.relpath(reference, self.root)
        if path in self.exact and path in self.exact[path]:
            return path
        return _only(self.exact.get(path, []))

    def _by_end(self, reference: str) -> str | None:
        parts = [part for part in reference.split("/") if part not in ("", ".", "..")]
        for place in range(len(parts)):
            if names := self.by_end.get("/".join(parts[place:])):
                return _only(names)
            if "/".join(parts[place:-1]) in self.folder_ends:
                return None  # the folder is here, the file is not
        return None


def _ends(path: str) -> list[str]:
    """a/b/c, b/c and c."""
    parts = path.split("/")
    return ["/".join(parts[place:]) for place in range(len(parts))]


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None
