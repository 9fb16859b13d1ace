"""What a picture must show, as questions with the answer that is right."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SoftREPAError, shown

YES = "yes"


@dataclass(frozen=True)
class Fact:
    """A question to a picture, and the answer that is right."""

    question: str
    answer: str = YES


def parse_fact(value: object, place: str) -> Fact:
    """A text, of which yes is right, or a pair of a question as it is asked and its answer. Raises SoftREPAError."""
    if isinstance(value, str) and value.strip():
        return Fact(as_question(value))
    if isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) and one.strip() for one in value):
        return Fact(*(one.strip() for one in value))
    raise SoftREPAError(
        f"{place}: a fact is {shown(json.dumps(value))}, expected a text or a pair of a question and its answer."
    )


def as_question(text: str) -> str:
    """A question as it is; of what a picture should show whether it does."""
    text = text.strip()
    return text if text.endswith("?") else f"Does this image show {text.rstrip('.')}?"


def whole(prompt: str) -> Fact:
    """All that a prompt says, asked at once."""
    return Fact(f'Does this image show "{prompt}"?')


def parse_facts(text: str, prompts: Sequence[str]) -> list[tuple[Fact, ...]]:
    """A line for each prompt, its facts with semicolons between them; an empty text says none. Raises SoftREPAError."""
    if not text.strip():
        return [() for _ in prompts]
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != len(prompts):
        raise SoftREPAError(
            f"facts has {len(lines)} lines, expected {len(prompts)}: one for each prompt, its facts with semicolons "
            "between them."
        )
    return [tuple(Fact(as_question(part)) for part in line.split(";") if part.strip()) for line in lines]
