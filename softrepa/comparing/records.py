"""Compared pictures and their scores on disk, in a folder that any other program can read.

    <folder>/<arm>-<hash>/<prompt>-<hash>_<seed>.png   a picture
    <folder>/pictures.csv                              arm, prompt (its number), seed, text, file
    <folder>/scores/<judge>.csv                        file, score

A picture's name follows from all that it was drawn from. So what is there never has to be drawn again, whatever is
added or left out, and nothing has to be remembered but the files.
"""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import SoftREPAError, said, shown, unwritable
from ..files import UnreadableError, is_file, read_bounded, write_atomically

PICTURES, SCORES = "pictures.csv", "scores"
MOST_TABLE = 1 << 28
"""Bytes of a table: a million pictures with prompts of 200 characters."""
COLUMNS = ("arm", "prompt", "seed", "text", "file")


@dataclass(frozen=True)
class Arm:
    """One of the ways to draw that are compared. `settings` are all that decide its pictures beside prompt and seed."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def folder(self) -> str:
        return f"{file_name(self.name)}-{short_hash(json.dumps(self.settings, sort_keys=True))}"


@dataclass(frozen=True)
class Record:
    """A picture: of which arm, of which prompt (by number and text) and seed, and its file inside the folder."""

    arm: str
    prompt: int
    seed: int
    text: str
    file: str

    @property
    def pair(self) -> tuple[int, int]:
        """What it shares with the pictures it is compared with."""
        return self.prompt, self.seed


def record(arm: Arm, prompt: int, text: str, seed: int) -> Record:
    return Record(arm.name, prompt, seed, text, f"{arm.folder}/{file_name(text)}-{short_hash(text)}_{seed}.png")


def file_name(text: str) -> str:
    """The beginning of a text as every file system takes it."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text)[:40].strip("_.") or "untitled"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:8]


def is_drawn(folder: Path, one: Record) -> bool:
    return is_file(folder / one.file)


def write_picture(folder: Path, one: Record, pixels: np.ndarray) -> None:
    """(H, W, 3) of 0 to 1, whole or not at all."""
    picture = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    write_whole(folder / one.file, lambda temporary: picture.save(temporary, "PNG", compress_level=4))


def read_picture(folder: Path, one: Record) -> np.ndarray:
    """Float32 (H, W, 3) of 0 to 1. Raises SoftREPAError where another program broke or removed the file."""
    path = folder / one.file
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises
        reason = said(error) if isinstance(error, OSError) else shown(error)
        raise SoftREPAError(
            f"{shown(path)} cannot be read ({reason}), expected the picture that was drawn; delete the file to have it "
            "drawn anew."
        ) from None


def write_records(folder: Path, records: Iterable[Record]) -> None:
    rows = ([getattr(one, name) for name in COLUMNS] for one in records)
    write_csv(folder / PICTURES, COLUMNS, rows)


def read_records(folder: Path) -> list[Record]:
    """Raises SoftREPAError."""
    found = []
    for number, row in enumerate(_read_csv(folder / PICTURES, COLUMNS), 2):
        try:
            found.append(Record(row[0], int(row[1]), int(row[2]), row[3], row[4]))
        except ValueError:
            raise SoftREPAError(
                f"{shown(folder / PICTURES)}, line {number}: prompt and seed are {shown(row[1:3])}, expected numbers."
            ) from None
    return found


def scores_path(folder: Path, judge: str) -> Path:
    """Of a judge's scores. `judge` says which one it is, with all that decides its scores."""
    return folder / SCORES / f"{file_name(judge)}-{short_hash(judge)}.csv"


def write_scores(path: Path, scores: Mapping[str, float]) -> None:
    """By the picture's file."""
    write_csv(path, ("file", "score"), ([name, repr(float(score))] for name, score in scores.items()))


def read_scores(path: Path) -> dict[str, float]:
    """None yet where no file is. Raises SoftREPAError."""
    if not is_file(path):
        return {}
    found = {}
    for number, (name, score) in enumerate(_read_csv(path, ("file", "score")), 2):
        try:
            found[name] = float(score)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise SoftREPAError(f"{shown(path)}, line {number}: score is {shown(score)}, expected a finite number.")
    return found


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)

    write_whole(path, fill)


def write_text(path: Path, text: str) -> None:
    """As `write_whole`."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_whole(path: Path, fill: Callable[[Path], object]) -> None:
    """As `files.write_atomically`. Raises SoftREPAError where there is no room."""
    try:
        write_atomically(path, fill)
    except OSError as error:
        raise unwritable(path, error) from None


def _read_csv(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    """The rows below the head, each as long as it."""
    try:
        text = read_bounded(path, MOST_TABLE).decode("utf-8")
        head, *rows = csv.reader(io.StringIO(text, newline=""))
    except (UnreadableError, FileNotFoundError) as error:
        raise SoftREPAError(f"{shown(path)} cannot be read ({said(error)}), expected a table.") from None
    except (ValueError, csv.Error):  # no UTF-8, nothing in it, a cell of a megabyte
        raise SoftREPAError(f"{shown(path)} is no table, expected the columns {', '.join(columns)}.") from None
    if any(len(row) != len(columns) for row in (head, *rows)) or tuple(head) != columns:
        raise SoftREPAError(f"{shown(path)} begins with {shown(head)}, expected the columns {', '.join(columns)}.")
    return rows
