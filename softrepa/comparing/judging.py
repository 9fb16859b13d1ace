"""Judges: what scores a picture of a comparison, and how their scores are kept."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import SoftREPAError, shown
from ..statistics import Unit
from .inputs import Prompt
from .records import Record, read_picture, read_scores, scores_path, write_scores
from .summary import Judged

SECONDS = 30
"""Between two writings of the scores."""

Scorer = Callable[[Record, torch.Tensor], float]
"""Of a picture (1, H, W, 3) of 0 to 1."""


class Compared(Protocol):
    """What a judge may know of a comparison."""

    @property
    def prompts(self) -> Sequence[Prompt]: ...

    @property
    def model(self) -> Any:
        """The plain MODEL."""

    @property
    def clip(self) -> Any: ...

    @property
    def vae(self) -> Any: ...

    @property
    def identity(self) -> str:
        """Of the three, with what is on the MODEL."""


class Judge(Protocol):
    """Scores pictures one by one, prompt by prompt."""

    title: str
    unit: Unit

    def check(self, compared: Compared) -> None:
        """Raises SoftREPAError for what it cannot judge, before anything is drawn."""

    def key(self, compared: Compared) -> str:
        """Says all that decides a score beside the picture and its prompt."""

    def note(self) -> str:
        """How it judged, for the table."""

    def opened(self, compared: Compared) -> Scorer: ...


def judge_pictures(
    judge: Judge, compared: Compared, folder: Path, records: Sequence[Record], tick: Callable[[int, int], None]
) -> Judged:
    """The scores of all records; those that are kept in the folder are not asked for again.

    They are written as they come, so that a judge who is stopped goes on. `tick` is told how far it is.
    """
    path = scores_path(folder, f"{judge.title} {judge.key(compared)}")
    scores = read_scores(path)
    missing = [one for one in records if one.file not in scores]
    scorer, written = judge.opened(compared), time.monotonic()
    try:
        for done, one in enumerate(missing):
            tick(done, len(missing))
            score = scorer(one, torch.from_numpy(read_picture(folder, one))[None])
            if not torch.isfinite(torch.tensor(score)):
                raise SoftREPAError(f'{judge.title} gives {score} for "{shown(one.file)}", expected a finite number.')
            scores[one.file] = score
            if time.monotonic() - written > SECONDS:
                write_scores(path, scores)
                written = time.monotonic()
    finally:
        if missing:
            write_scores(path, scores)
    return Judged(judge.title, judge.unit, {one.file: scores[one.file] for one in records}, judge.note())
