"""What a person gives a comparison: prompts, seeds, strengths and what a sampler takes."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..data.tables import lines_of
from ..errors import SoftREPAError, said, shown
from ..files import UnreadableError, parse_json, read_bounded
from .facts import Fact, parse_fact

MOST_FILE = 1 << 26
"""Bytes of a file of prompts."""
MOST_SEED = 2**64 - 1
MOST_SEEDS = 10_000
MOST_STRENGTH = 10


@dataclass(frozen=True)
class CompareInputs:
    """By the names of the node's inputs."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("prompts",)

    prompts: str = ""
    negative_prompt: str = ""
    seeds: str = "0, 1, 2"
    strengths: str = "0, 1"
    steps: int = 28
    cfg: float = 4.5
    sampler_name: str = "euler"
    scheduler: str = "normal"
    width: int = 1024
    height: int = 1024
    shown: int = 64
    filename_prefix: str = "compare"


@dataclass(frozen=True)
class Prompt:
    """`facts` are what a file says of it that a picture must show; without any it is asked as a whole."""

    text: str
    facts: tuple[Fact, ...] = ()


def parse_prompts(text: str) -> list[Prompt]:
    """A prompt a line; lines with nothing on them separate."""
    return distinct("prompts", [Prompt(line.strip()) for line in text.splitlines() if line.strip()])


def distinct(name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Raises SoftREPAError for none, and for two of one text: they would count as two that agree."""
    if not prompts:
        raise SoftREPAError(f"{name} holds no prompt, expected one or more, each on a line.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.text in seen:
            raise SoftREPAError(f'{name} says "{shown(prompt.text)}" twice, expected different prompts.')
        seen.add(prompt.text)
    return list(prompts)


def read_prompts(path: Path) -> list[Prompt]:
    """A .txt of a prompt a line, or a .jsonl of objects with `prompt` and, if any, `facts` or GenEval 2's `vqa_list`.

    Raises SoftREPAError.
    """
    try:
        text = read_bounded(path, MOST_FILE).decode("utf-8-sig")
    except OSError as error:
        raise SoftREPAError(f"{shown(path.name)} cannot be read ({said(error)}), expected a file of prompts.") from None
    except UnicodeDecodeError:
        raise SoftREPAError(f"{shown(path.name)} is not UTF-8, expected a text file of prompts.") from None
    lines = [(number, line.strip()) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    if path.suffix.lower() != ".jsonl":
        return distinct(shown(path.name), [Prompt(line) for _, line in lines])
    return distinct(shown(path.name), [_of_json(line, f"{shown(path.name)}, line {number}") for number, line in lines])


def _of_json(line: str, place: str) -> Prompt:
    try:
        entry: Any = parse_json(line)
    except UnreadableError as error:
        raise SoftREPAError(f"{place} is {error}, expected an object with a prompt.") from None
    text = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise SoftREPAError(f'{place} is {shown(line)}, expected an object with a text for "prompt".')
    facts = entry.get("facts") or entry.get("vqa_list") or []
    if not isinstance(facts, list):
        raise SoftREPAError(f"{place}: facts are {shown(json.dumps(facts))}, expected a list.")
    return Prompt(text.strip(), tuple(parse_fact(fact, place) for fact in facts))


def parse_seeds(text: str) -> list[int]:
    """ "0, 1, 8-11" -> [0, 1, 8, 9, 10, 11]. Raises SoftREPAError."""
    found: list[int] = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        ends = [first, last] if dash else [first]
        if not all(end.isdecimal() and len(end) <= 20 and int(end) <= MOST_SEED for end in ends):
            raise SoftREPAError(f'seeds has "{shown(part)}", expected whole numbers such as 0, 1, 2 or 0-7.')
        seeds = range(int(first), int(ends[-1]) + 1)
        if not seeds or len(found) + int(ends[-1]) - int(first) + 1 > MOST_SEEDS:
            raise SoftREPAError(f'seeds has "{shown(part)}", expected 1 to {MOST_SEEDS:,} numbers that rise.')
        found += seeds
    if not found:
        raise SoftREPAError(f'seeds is "{shown(text)}", expected whole numbers such as 0, 1, 2 or 0-7.')
    return list(dict.fromkeys(found))


def parse_strengths(text: str) -> list[float]:
    """ "0, 1" -> [0.0, 1.0]; 0 comes first, for the others are compared with it. Raises SoftREPAError."""
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 <= value <= MOST_STRENGTH:
            raise SoftREPAError(f'strengths has "{shown(part)}", expected numbers from 0 to {MOST_STRENGTH}.')
        found.append(value)
    if not found:
        raise SoftREPAError(f'strengths is "{shown(text)}", expected numbers with commas between them such as 0, 1.')
    return sorted(dict.fromkeys(found), key=bool)


def number_text(value: float) -> str:
    """As it is written in an arm's name: 1 for 1.0, and every digit, for another number is another arm."""
    return repr(float(value)).removesuffix(".0")
