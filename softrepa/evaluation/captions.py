"""What an evaluation draws and edits: captions with their photographs, and photographs with pairs of prompts."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comparing.inputs import read_prompts
from ..data.captions import list_folder
from ..data.left_out import LeftOut
from ..data.sources import Source, WholeFile
from ..data.tables import BadTable, Row, Rows, bounded, layout_of, rows_of_csv, rows_of_json
from ..errors import SoftREPAError, said, shown
from ..files import is_file, is_folder, parse_json, read_bounded

MOST_TABLE = 2**26
READERS = {".json": rows_of_json, ".csv": rows_of_csv, ".tsv": rows_of_csv}
"""Of tables whose names say nothing more."""


@dataclass(frozen=True)
class Caption:
    """`name` is the photograph's in its table; `photograph` where it is, if it is there."""

    text: str
    name: str = ""
    photograph: Source | None = None


@dataclass(frozen=True)
class Edit:
    """A photograph, what it shows, and what it should show."""

    name: str
    photograph: Source
    source: str
    target: str


def read_captions(path: Path, images: Path | None, label: str = "captions") -> tuple[list[Caption], str]:
    """The first caption of every image of a folder or of a table, and what was left out of it, in a line.

    Photographs of a table lie in `images`, else beside it. Raises SoftREPAError.
    """
    if is_folder(path):
        listing = list_folder(path)
        found = [Caption(texts[0], name, listing.sources[name]) for name, texts in listing.captions.items()
                 if name in listing.sources]  # fmt: skip
        left_out = listing.left_out
    elif is_file(path):
        left_out = LeftOut()
        found = _of_table(label, path, images or path.parent, left_out)
    else:
        raise SoftREPAError(f'{label} is "{shown(path)}", expected a file or a folder of captions.')
    if not found:
        reasons = left_out.told() or "none there"
        raise SoftREPAError(f'{label} "{shown(path)}" has no caption ({reasons}), expected one or more.')
    return found, left_out.told()


def _of_table(label: str, path: Path, images: Path, left_out: LeftOut) -> list[Caption]:
    layout = layout_of(path.name)
    if path.suffix.lower() == ".txt" and layout is None:
        return [Caption(prompt.text) for prompt in read_prompts(path)]
    rows = layout.rows if layout else READERS.get(path.suffix.lower())
    if rows is None:
        raise SoftREPAError(
            f'{label} is "{shown(path)}", expected a .json, .jsonl, .csv, .tsv, .parquet or .txt file, or a folder.'
        )
    found: dict[str, Caption] = {}
    try:
        for row in _usable(rows(WholeFile(path)), left_out):
            found.setdefault(row.reference, Caption(row.captions[0], row.reference, _photograph(row, images)))
    except (BadTable, OSError) as problem:
        reason = said(problem) if isinstance(problem, OSError) else str(problem)
        raise SoftREPAError(
            f'{label} "{shown(path)}" cannot be read ({reason}), expected a table of captions.'
        ) from None
    return list(found.values())


def _usable(rows: Rows, left_out: LeftOut) -> Iterator[Row]:
    for row in bounded(rows):
        if not isinstance(row, Row):
            left_out.add(row.place, row.reason)
        elif not row.captions:
            left_out.add(row.reference, "no caption")
        else:
            yield row


def _photograph(row: Row, images: Path) -> Source | None:
    return row.image or found_in(images, row.reference)


def found_in(images: Path, name: str) -> Source | None:
    """By the path that a table names, or by the file's name alone, as most tables' images were moved."""
    relative = name.replace("\\", "/")
    for candidate in (relative, relative.rpartition("/")[2]):
        if is_file(images / candidate):
            return WholeFile(images / candidate)
    return None


def check_photographs(captions: list[Caption], metrics: list[str]) -> None:
    """Refuses metrics that compare with photographs where one is missing."""
    missing = [caption.name or caption.text for caption in captions if caption.photograph is None]
    if metrics and missing:
        raise SoftREPAError(
            f"images holds {len(captions) - len(missing):,} of {len(captions):,} photographs (first missing "
            f"{shown(missing[0])}), expected all of them: metrics {', '.join(metrics)} compare with them."
        )


def read_edits(path: Path, images: Path | None) -> list[Edit]:
    """A list of {image, source, targets}, or PIE-Bench's mapping_file.json. Raises SoftREPAError.

    Photographs lie in `images`, else beside the table.
    """
    label = f'edits "{shown(path)}"'
    try:
        content = parse_json(read_bounded(path, MOST_TABLE))
    except OSError as error:
        raise SoftREPAError(f"{label} cannot be read ({said(error)}), expected a table of edits.") from None
    if isinstance(content, dict):
        rows = [(f"entry {shown(key)}", *_of_pie_bench(entry)) for key, entry in content.items()]
        images = images or path.parent / "annotation_images"
    elif isinstance(content, list):
        rows = [(f"entry {number}", *_of_list(entry)) for number, entry in enumerate(content, 1)]
    else:
        rows = []
    if not rows:
        raise SoftREPAError(f"{label} holds no edits, expected a list of image, source and targets.")
    found = [one for row in rows for one in _edits(label, images or path.parent, *row)]
    (most, times), *_ = Counter(found).most_common(1)
    if times > 1:  # they would count as two that agree
        raise SoftREPAError(
            f"{label} holds {times} edits of {shown(most.name)} with one source and target, expected different ones."
        )
    return found


def _of_list(entry: Any) -> tuple[Any, Any, Any]:
    entry = entry if isinstance(entry, dict) else {}
    return entry.get("image"), entry.get("source"), entry.get("targets")


def _of_pie_bench(entry: Any) -> tuple[Any, Any, Any]:
    """Its brackets mark the words that change."""
    entry = entry if isinstance(entry, dict) else {}
    source, target = (entry.get(name) for name in ("original_prompt", "editing_prompt"))
    source, target = (text.replace("[", "").replace("]", "") if isinstance(text, str) else None
                      for text in (source, target))  # fmt: skip
    return entry.get("image_path"), source, [target]


def _edits(label: str, images: Path, place: str, name: Any, source: Any, targets: Any) -> Iterator[Edit]:
    texts = [source, *targets] if isinstance(targets, list) and targets else [None]
    if not isinstance(name, str) or not all(isinstance(text, str) for text in texts):
        raise SoftREPAError(f"{label}, {place} lacks an image, a source or a target, expected a name and texts.")
    photograph = found_in(images, name)
    if photograph is None:
        raise SoftREPAError(f'{label}, {place}: no image "{shown(name)}" in {shown(images)}, expected it there.')
    for target in targets:
        yield Edit(name, photograph, source.strip(), target.strip())


def paired_edits(source: Path, target: Path, images: Path | None) -> tuple[list[Edit], list[str]]:
    """Of two tables of captions for the same images, as DIV2K is edited in the paper; and what was left out of them.

    Raises SoftREPAError.
    """
    tables, notes = [], []
    for path, label in ((source, "source_prompts"), (target, "target_prompts")):
        captions, left_out = read_captions(path, images, label)
        tables.append({caption.name: caption for caption in captions})
        notes += [f"{label}: {left_out}"] if left_out else []
    before, after = tables
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise SoftREPAError(
            f"source_prompts and target_prompts differ in {len(odd)} images (first {shown(odd[0])}), expected the same."
        )
    missing = [name for name, caption in before.items() if caption.photograph is None]
    if missing:
        raise SoftREPAError(f'images holds no "{shown(missing[0])}", expected all {len(before)} of source_prompts.')
    edits = [
        Edit(name, caption.photograph, caption.text, after[name].text)
        for name, caption in before.items()
        if caption.photograph is not None
    ]
    return edits, notes
