"""Files that hold the captions of many images, and those of one image beside it: how they are read.

A table gives rows, each a file as the table calls it and its captions; what cannot be read is a problem with its place.
"""

import csv
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import shown
from ..files import is_file
from .sources import Cell, Source, WholeFile, check_row_group, opened_parquet

FILE_KEYS = ("file_name", "image_path", "image", "image_name", "filename", "file_path", "filepath", "file", "path")
CAPTION_KEYS = ("text", "caption", "captions", "prompt", "comment", "tags")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
"""Columns of a parquet file that may hold the images themselves."""

LONGEST_CAPTION = 10_000
"""Characters: a text encoder would make hundreds of chunks of more, and it is rather a book or a log."""
MOST_SIDECAR = 2**18
MOST_TABLE = 2**28
"""Bytes of a caption file beside an image, and of a table."""
MOST_ROWS, MOST_TEXT = 10**6, 2**28
"""Rows of a table, and characters of all their captions: they are held until each has found its image."""
MOST_LIST, MOST_CELL = 100, 2**17
"""Captions of a row in a parquet file, and bytes of a cell."""
MOST_MARKS = 2**23
"""Brackets and commas of a JSON text, each of which may cost a hundred bytes when it is read."""

NO_TEXT = "captions that are no text"
UNPAIRED = "a quote that is not closed, or stands inside of a cell"
TOO_LONG = f"a caption of more than {LONGEST_CAPTION:,} characters"


class Row(NamedTuple):
    """A file as a table calls it, and its captions; or the image itself."""

    reference: str
    captions: list[str]
    image: Cell | None = None
    is_apart: bool = False
    """Of a layout whose tables stand in a folder of their own and give bare names."""


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used: which one, and why."""

    place: str
    reason: str


class BadTable(Exception):
    """Why a table as a whole, or its rest, cannot be read."""


Rows = Iterator[Row | Problem]


def decoded(data: bytes) -> str:
    """UTF-8, or with a byte-order mark UTF-16. Raises BadTable."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    else:
        encoding = "utf-8-sig"
        if b"\0" in data:
            raise BadTable("no text (it has NUL bytes, as UTF-16 without a byte-order mark)")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise BadTable(f"not {encoding.removesuffix('-sig').upper()}") from None
    if "\0" in text:
        raise BadTable("no text (it has NUL characters)")
    return text


def lines_of(text: str) -> list[str]:
    """Split where a file has line ends, and not at what Unicode calls one: U+2028 stands inside of captions."""
    return text.replace("\r\n", "\n").split("\n")


def text_captions(source: Source, whole: bool) -> list[str]:
    """Of a text file: every line, or the `whole` of it. Raises BadTable and OSError."""
    text = decoded(source.read(MOST_SIDECAR))
    return checked([text.replace("\r\n", "\n")] if whole else lines_of(text))


def json_captions(source: Source) -> list[str]:
    """Of a .json file beside an image. Raises BadTable and OSError."""
    return _captions_of(_parsed(decoded(source.read(MOST_SIDECAR))))


def rows_of_jsonl(source: Source) -> Rows:
    for number, line in enumerate(lines_of(decoded(source.read(MOST_TABLE))), 1):
        if line.strip():
            try:
                entry = _parsed(line)
            except BadTable as problem:
                yield Problem(f"line {number}", str(problem))
            else:
                yield _row(entry, f"line {number}")


def rows_of_json(source: Source) -> Rows:
    """A name -> caption object, a list of rows, or COCO."""
    content = _parsed(decoded(source.read(MOST_TABLE)))
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        yield from _rows_of_coco(content)
    elif isinstance(content, dict):
        for reference, value in content.items():
            try:
                yield Row(reference, _captions_of(value))
            except BadTable as problem:
                yield Problem(reference, str(problem))
    elif isinstance(content, list):
        for number, entry in enumerate(content, 1):
            yield _row(entry, f"entry {number}")
    else:
        raise BadTable("neither an object nor a list")


def _rows_of_coco(content: dict) -> Rows:
    images = content.get("images")
    if not isinstance(images, list):
        raise BadTable("COCO annotations without a list of images")
    files: dict[object, str | None] = {}
    for image in images:
        if isinstance(image, dict) and _is_id(image_id := image.get("id")):
            name = image.get("file_name")
            is_one = isinstance(name, str) and files.get(image_id, name) == name
            files[image_id] = name if is_one else None
    for number, note in enumerate(content["annotations"], 1):
        image_id = note.get("image_id") if isinstance(note, dict) else None
        file = files.get(image_id) if _is_id(image_id) else None
        if file is None:
            yield Problem(f"annotation {number}", "no image, or several, of this annotation's image_id")
            continue
        try:
            yield Row(file, checked([note.get("caption")]), is_apart=True)
        except BadTable as problem:
            yield Problem(f"annotation {number}", str(problem))


SEPARATOR = re.compile(r'"?sep=(.)"?')
"""A line that Excel writes before the header."""


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)  # True would be the same key as 1


def rows_of_csv(source: Source) -> Rows:
    """Columns by their names in the first line, parted by commas, tabs, semicolons or bars."""
    text = decoded(source.read(MOST_TABLE)).replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    at = next((number for number, line in enumerate(lines) if line.strip()), 0)
    marks = ",\t;|"
    if named := SEPARATOR.fullmatch(lines[at].strip()):
        marks, at = named[1], min(at + 1, len(lines) - 1)
    parted = {mark: columns for mark in marks if (columns := _columns(lines[at], mark))}
    if not parted:
        found = shown(lines[at], 40)
        raise BadTable(f'columns "{found}", expected one for files and one for captions (file_name, text)')
    mark, (file, caption, width) = next(iter(parted.items()))
    at += 1
    while at < len(lines):
        place, here = f"line {at + 1}", at
        at += 1
        try:
            cells, count = _cells(lines, here, mark, file, width)
            at = here + count
            if not any(cells):
                continue
            if len(cells) > width == caption + 1:  # marks in a text that nobody quoted
                cells[caption:] = [mark.join(cells[caption:])]
            if len(cells) != width:
                raise BadTable("more or fewer cells than in the first line")
            row: Row | Problem = Row(cells[file].strip(), checked([cells[caption]]))
        except BadTable as problem:
            row = Problem(place, str(problem))
        yield row


def _cells(lines: list[str], at: int, mark: str, file: int, width: int) -> tuple[list[str], int]:
    """Those of the row that begins in a line, and how many lines it has.

    A quote that nobody closed must not swallow the next rows: it makes this line a bad one, and the next is read anew.
    Among tabs it is a part of the text.
    """
    rows = csv.reader((f"{lines[number]}\n" for number in range(at, len(lines))), delimiter=mark, strict=True)
    try:
        cells = next(rows)
        further = [line.split(mark) for line in lines[at + 1 : at + rows.line_num]]
        if not any(len(row) >= width and _suffix(row[file]) == _suffix(cells[file]) for row in further):
            return cells, rows.line_num
    except csv.Error:
        pass
    if mark == "\t":
        return lines[at].split(mark), 1
    raise BadTable(UNPAIRED if '"' in lines[at] else f"a cell of more than {csv.field_size_limit():,} characters")


def _suffix(name: str) -> str:
    return posixpath.splitext(name.strip())[1].lower()


TOKEN = re.compile(r"(.+?)#\d+\t(.*)")
"""A line of Flickr8k.token.txt."""


def rows_of_flickr(source: Source) -> Rows:
    """Flickr's: columns with a header, or the older lines `name.jpg#0`, a tab and the caption."""
    lines = lines_of(decoded(source.read(MOST_TABLE)))
    if not TOKEN.match(next((line for line in lines if line.strip()), "")):
        for row in rows_of_csv(source):
            yield row._replace(is_apart=True) if isinstance(row, Row) else row
        return
    for number, line in enumerate(lines, 1):
        found = TOKEN.fullmatch(line)
        try:
            if found:
                yield Row(found[1], checked([found[2]]), is_apart=True)
            elif line.strip():
                yield Problem(f"line {number}", "no name.jpg#0 with a tab behind it")
        except BadTable as problem:
            yield Problem(f"line {number}", str(problem))


def rows_of_parquet(source: Source) -> Rows:
    """Rows that name files, or hold the images themselves."""
    if not isinstance(source, WholeFile):
        raise BadTable("a parquet file inside a shard")
    with opened_parquet(source.path) as file:
        kinds = {field.name: str(field.type) for field in file.schema_arrow}
        leaves = [file.schema.column(number).path for number in range(len(file.schema))]
    image = _image_column(kinds)
    if not image and not kinds.keys() & set(FILE_KEYS):
        if is_file(source.path.with_suffix(".tar")):
            return  # img2dataset writes such a one beside each shard: it repeats what the shard holds
        raise BadTable(f"no column {' or '.join((*FILE_KEYS, *IMAGE_COLUMNS))}")
    columns = [key for key in (*FILE_KEYS, *CAPTION_KEYS) if TEXT_KIND.fullmatch(kinds.get(key, ""))]
    if not set(columns) & set(CAPTION_KEYS):
        raise BadTable(f"no text in a column {' or '.join(CAPTION_KEYS)}")
    total = 0
    with opened_parquet(source.path, [leaf for leaf in leaves if leaf.partition(".")[0] in columns]) as file:
        for group in range(file.num_row_groups):
            check_row_group(file, group, columns)
            number = 0
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                for cells in batch.columns:
                    _check_cells(cells)
                for place in range(len(batch)):
                    total += 1
                    row = {key: cells[place].as_py() for key, cells in zip(columns, batch.columns, strict=True)}
                    yield _row(row, f"row {total}", Cell(source.path, group, number, image) if image else None)
                    number += 1


TEXT_KIND = re.compile(
    r"((large_)?list<\w+: )?((large_)?string|dictionary<values=(large_)?string, [^<>]*>)( not null)?>?"
)
"""What pyarrow calls a column of texts, or of lists of them."""


def _check_cells(cells) -> None:
    """Raises BadTable for a text, or a list of texts, that is no caption. Until then equal ones are held once."""
    from pyarrow import compute

    if hasattr(cells, "values"):  # lists
        if (compute.max(compute.list_value_length(cells)).as_py() or 0) > MOST_LIST:
            raise BadTable(f"a list of more than {MOST_LIST} captions")
        cells = cells.values
    if (compute.max(compute.binary_length(cells.dictionary)).as_py() or 0) > MOST_CELL:
        raise BadTable(f"a cell of more than {MOST_CELL:,} bytes")


def _image_column(kinds: dict[str, str]) -> str:
    """As pyarrow names the column of the images' bytes, or an empty text: Hugging Face keeps them in a struct."""
    for name in IMAGE_COLUMNS:
        kind = kinds.get(name, "")
        if kind.startswith("struct<") and re.search("bytes: (large_)?binary", kind):
            return f"{name}.bytes"
        if kind in ("binary", "large_binary"):
            return name
    return ""


@dataclass(frozen=True)
class Layout:
    """Tables of one kind: what they are called in a message, their file names in lower case, how they are read."""

    title: str
    names: re.Pattern
    rows: Callable[[Source], Rows]


TABLES = (
    Layout("captions.txt", re.compile(r"captions\.txt|results\.csv|.*\.token(\.txt)?"), rows_of_flickr),
    Layout("*.jsonl", re.compile(r".*\.jsonl"), rows_of_jsonl),
    Layout("*.csv", re.compile(r".*\.[ct]sv"), rows_of_csv),
    Layout("captions*.json", re.compile(r"captions.*\.json"), rows_of_json),
    Layout("meta_*.json", re.compile(r"meta_.*\.json"), rows_of_json),
    Layout("*.parquet", re.compile(r".*\.parquet"), rows_of_parquet),
)


def layout_of(file_name: str) -> Layout | None:
    return next((layout for layout in TABLES if layout.names.fullmatch(file_name.lower())), None)


def checked(texts: list) -> list[str]:
    """Captions that can be used, trimmed, without the empty ones. Raises BadTable."""
    trimmed = []
    for text in texts:
        if not isinstance(text, str) or not is_text(text):
            raise BadTable(NO_TEXT)
        if len(text := text.strip()) > LONGEST_CAPTION:
            raise BadTable(TOO_LONG)
        if text:
            trimmed.append(text)
    return trimmed


def is_text(text: str) -> bool:
    """False with lone surrogates, in which Python carries bytes of a file name that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _columns(header: str, mark: str) -> tuple[int, int, int] | None:
    """Where the file and the caption stand, if both are there; and how many columns there are."""
    names = [cell.strip().lower() for cells in csv.reader([header[:MOST_SIDECAR]], delimiter=mark) for cell in cells]
    files, captions = ([names.index(key) for key in keys if key in names] for keys in (FILE_KEYS, CAPTION_KEYS))
    return (files[0], captions[0], len(names)) if files and captions else None


def bounded(rows: Rows) -> Rows:
    """The rows of a table as far as they can be held. Raises BadTable."""
    size = 0
    for count, row in enumerate(rows, 1):
        if isinstance(row, Row):
            size += len(row.reference) + sum(map(len, row.captions))
        if count > MOST_ROWS:
            raise BadTable(f"more than {MOST_ROWS:,} rows")
        if size > MOST_TEXT:
            raise BadTable(f"captions of more than {MOST_TEXT:,} characters in all")
        yield row


def _parsed(text: str):
    if sum(map(text.count, "[{,")) > MOST_MARKS:
        raise BadTable(f"JSON of more than {MOST_MARKS:,} values")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadTable("not JSON") from None


def _row(entry, place: str, image: Cell | None = None) -> Row | Problem:
    found = [entry[key] for key in FILE_KEYS if isinstance(entry.get(key), str)] if isinstance(entry, dict) else []
    if not found and image is None:
        return Problem(place, f"none of {', '.join(FILE_KEYS)}")
    try:
        return Row(found[0] if found else place, _captions_of(entry), image)
    except BadTable as problem:
        return Problem(place, str(problem))


def _captions_of(value) -> list[str]:
    """The captions in a cell, one text or a list of them, or in the first caption column of an object that has some."""
    if not isinstance(value, dict):
        return checked(value if isinstance(value, list) else [value])
    for key in CAPTION_KEYS:
        cell = value.get(key, [])
        if key == "tags" and isinstance(cell, list) and all(isinstance(tag, str) for tag in cell):
            cell = ", ".join(cell)
        if cell is not None and (captions := checked(cell if isinstance(cell, list) else [cell])):
            return captions
    return []
