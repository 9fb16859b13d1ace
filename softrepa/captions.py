"""Which image files a folder holds and which captions they have: text files beside them, and caption tables.

Tables: *.jsonl (Hugging Face `file_name` + `text`, kohya `image_path` + `caption`), captions*.json (a name -> caption
object, a list of such rows, or COCO) and *.parquet. An image has the captions of all sources together.
"""

import json
import os
import posixpath
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".jxl", ".jp2")
OTHER_SUFFIXES = (".bmp", ".tif", ".tiff", ".gif", ".tga", ".ppm")
IMAGE_SUFFIXES = frozenset(PHOTO_SUFFIXES + OTHER_SUFFIXES)
"""Files with these names are opened or, where PIL knows no way, reported."""

SIDECAR_SUFFIXES = (".txt", ".caption")
FILE_KEYS = ("file_name", "image_path")
CAPTION_KEYS = ("text", "caption", "captions")

Row = tuple[str, list[str]]
"""A file as a table calls it, and its captions."""
Rows = Iterator["Row | _BadTable"]


@dataclass(frozen=True)
class Rejected:
    """Something of the folder that is not used, and why."""

    name: str
    reason: str


@dataclass
class Listing:
    """Images by their name, the path below the folder with forward slashes, sorted; and what was left out."""

    paths: dict[str, Path] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)

    def add(self, name: str, captions: list[str]) -> None:
        known = self.captions.setdefault(name, [])
        known += [caption for caption in dict.fromkeys(captions) if caption not in known]

    def reject(self, name: str, reason: str) -> None:
        self.rejected.append(Rejected(name, reason))


def list_folder(root: Path) -> Listing:
    """All images below `root` that have captions."""
    listing, tables, sidecars = Listing(), [], []
    for path in sorted_files(root):
        name = name_in(root, path)
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            listing.paths[name] = path
        elif suffix in SIDECAR_SUFFIXES:
            sidecars.append((name, path))
        elif is_table(path):
            tables.append((name, path))
    _read_sidecars(listing, sidecars)
    lookup = _Lookup(listing.paths)
    for name, path in tables:
        _read_table(listing, lookup, name, path)
    for name in [name for name in listing.paths if not listing.captions.get(name)]:
        del listing.paths[name]
        listing.reject(name, "no caption")
    return listing


def sorted_files(root: Path) -> list[Path]:
    """Every file below `root` by name; hidden ones are passed over, linked folders are entered once."""
    found, entered = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in entered else [name for name in folders if not name.startswith(".")]
        if real not in entered:
            found += [Path(folder) / name for name in files if not name.startswith(".")]
        entered.add(real)
    return sorted(found, key=lambda path: name_in(root, path))


def is_table(path: PurePath) -> bool:
    suffix = path.suffix.lower()
    return suffix in (".jsonl", ".parquet") or (suffix == ".json" and path.name.lower().startswith("captions"))


def name_in(root: Path, path: Path) -> str:
    """The path below `root` with forward slashes; composed, as macOS may list the accents of a name apart."""
    return unicodedata.normalize("NFC", path.relative_to(root).as_posix())


def _read_sidecars(listing: Listing, sidecars: list[tuple[str, Path]]) -> None:
    by_stem: dict[str, list[str]] = {}
    for image in listing.paths:
        by_stem.setdefault(posixpath.splitext(image)[0], []).append(image)
    for name, path in sidecars:
        images = by_stem.get(posixpath.splitext(name)[0])
        if images is None:
            listing.reject(name, "no image of this name")
            continue
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            listing.reject(name, "not UTF-8")
            continue
        except OSError as error:
            listing.reject(name, f"cannot be read ({error.strerror})")
            continue
        captions = [line.strip() for line in lines if line.strip()]
        if not captions:
            listing.reject(name, "empty")
        for image in images:
            listing.add(image, captions)


def _read_table(listing: Listing, lookup: "_Lookup", name: str, path: Path) -> None:
    try:
        for row in READERS[path.suffix.lower()](path):
            if isinstance(row, _BadTable):
                listing.reject(name, str(row))
                continue
            reference, captions = row
            image = lookup.find(posixpath.dirname(name), reference)
            if image is None:
                listing.reject(reference, f"named in {name}, but no file here, or several")
            elif not captions:
                listing.reject(reference, f"no caption in {name}")
            else:
                listing.add(image, captions)
    except UnicodeDecodeError:
        listing.reject(name, "not UTF-8")
    except (_BadTable, OSError) as error:
        listing.reject(name, str(error))


class _BadTable(Exception):
    """Why a table, or a row of it, cannot be read."""


class _Lookup:
    """Finds the image a table means: relative to the table, else the only image of that file name.

    Tables name files with and without folder, with and without suffix, and with paths of the machine they were made on;
    COCO's stand beside the image folders.
    """

    def __init__(self, names):
        self.names = frozenset(names)
        self.by_key: dict[str, list[str]] = {}
        for name in self.names:
            base = posixpath.basename(name)
            for key in {name, base, posixpath.splitext(name)[0], posixpath.splitext(base)[0]}:
                self.by_key.setdefault(key, []).append(name)

    def find(self, table_folder: str, reference: str) -> str | None:
        reference = unicodedata.normalize("NFC", reference.replace("\\", "/"))
        beside = posixpath.normpath(posixpath.join(table_folder, reference))
        if beside in self.names:
            return beside
        for key in (beside, posixpath.basename(reference)):
            names = self.by_key.get(key, [])
            if len(names) == 1:
                return names[0]
        return None


def _rows_of_jsonl(path: Path) -> Rows:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                yield _row(_parsed(line), f"line {number}")
            except _BadTable as problem:
                yield _BadTable(f"line {number} is {problem}")


def _rows_of_json(path: Path) -> Rows:
    content = _parsed(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        yield from _rows_of_coco(content)
    elif isinstance(content, dict):
        for reference, value in content.items():
            captions = _texts(_captions_of(value) if isinstance(value, dict) else value)
            yield _BadTable(f"{reference} has captions that are no text") if captions is None else (reference, captions)
    elif isinstance(content, list):
        for number, entry in enumerate(content, 1):
            yield _row(entry, f"entry {number}")
    else:
        raise _BadTable("neither an object nor a list")


def _rows_of_coco(content: dict) -> Rows:
    try:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[str, list[str]] = {}
        for note in content["annotations"]:
            captions.setdefault(files[note["image_id"]], []).append(note["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise _BadTable(f"not COCO captions ({type(error).__name__}: {error})") from None
    yield from captions.items()


def _rows_of_parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise _BadTable("pyarrow is not installed") from None
    try:
        with ParquetFile(path) as file:
            columns = [key for key in (*FILE_KEYS, *CAPTION_KEYS) if key in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                for number, row in enumerate(batch.to_pylist(), 1):
                    yield _row(row, f"row {number}")
    except ArrowException as error:
        raise _BadTable(f"not a parquet file ({error})") from None


READERS = {".jsonl": _rows_of_jsonl, ".json": _rows_of_json, ".parquet": _rows_of_parquet}


def _parsed(text: str):
    try:
        return json.loads(text)
    except ValueError:
        raise _BadTable("not JSON") from None


def _row(entry, where: str) -> "Row | _BadTable":
    reference = next((entry[key] for key in FILE_KEYS if key in entry), None) if isinstance(entry, dict) else None
    if not isinstance(reference, str):
        return _BadTable(f"{where} has no {' or '.join(FILE_KEYS)}")
    captions = _texts(_captions_of(entry))
    return _BadTable(f"{where} has captions that are no text") if captions is None else (reference, captions)


def _captions_of(entry: dict):
    return next((entry[key] for key in CAPTION_KEYS if entry.get(key) is not None), [])


def _texts(value) -> list[str] | None:
    """The captions in a table's cell, one text or a list of them."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return None
    return [text.strip() for text in texts if text.strip()]
