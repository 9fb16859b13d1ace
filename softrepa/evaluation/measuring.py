"""The scores of drawn pictures: each metric's in a file, so that what is judged never has to be judged again."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..comparing.records import Record, read_scores, scores_path, short_hash, write_scores, write_text
from ..comparing.summary import check_scores
from ..data.sources import Source
from ..errors import SoftREPAError
from ..files import is_file, parse_json, read_bounded
from ..progress_line import time_left
from ..statistics import Unit
from .metrics import JudgeOptions, Metric, judge_of
from .pictures import Picture, photograph_key, sized

SAVED = 64
"""Pictures, after which the scores are written."""
MOST_NOTES = 1 << 16
FEW_FOR_FID = 2048
"""Pictures: with fewer the covariance of Inception's features has no full rank, and FID depends on their number."""

Tell = Callable[[str], None]
JudgeOf = Callable[[Metric, Path, JudgeOptions], Any]


@dataclass(frozen=True)
class Measured:
    """A metric's scores by the pictures' files, or by arm where it judges all pictures of one together."""

    metric: Metric
    scores: Mapping[str, float] = field(default_factory=dict)
    of_arms: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    unit = Unit()


@dataclass(frozen=True)
class Drawn:
    """Pictures in a folder, and the photograph each is compared with, if it is with any, by number of its prompt."""

    folder: Path
    records: Sequence[Record]
    photographs: Mapping[int, Source | None]

    @cached_property
    def photograph_keys(self) -> list[str]:
        """Of each picture's; each is read once."""
        keys = {prompt: photograph_key(source) for prompt, source in self.photographs.items()}
        return [keys.get(one.prompt, "") for one in self.records]

    def picture(self, one: Record) -> Picture:
        return Picture(self.folder / one.file, one.text, self.photographs.get(one.prompt))


def measure(drawn: Drawn, metric: Metric, weights: Path, options: JudgeOptions, tell: Tell) -> Measured:
    """Judges what has no score yet. The judge is only loaded where there is something to do."""
    of = Measuring(drawn, metric, weights, options, tell)
    return of.arms() if metric.of_an_arm else of.pictures()


class Measuring:
    """One metric on its way through the pictures."""

    def __init__(self, drawn: Drawn, metric: Metric, weights: Path, options: JudgeOptions, tell: Tell):
        self.drawn, self.metric, self.weights, self.options, self.tell = drawn, metric, weights, options, tell
        own = {"lpips": [options.side, options.lpips_net], "hps": [options.hps_architecture]}.get(metric.name, [])
        compared = short_hash(repr(drawn.photograph_keys)) if metric.needs_photographs else ""
        self.path = scores_path(drawn.folder, f"{metric.name} {weights_key(weights)} {own} {compared}")
        self.notes = self.path.with_suffix(".json")
        self.scores = read_scores(self.path)
        self.judge: Any = None
        self.started = time.monotonic()

    def pictures(self) -> Measured:
        missing = [one for one in self.drawn.records if one.file not in self.scores]
        done = saved = 0
        try:
            while done < len(missing):
                judge = self._opened()
                some = missing[done : done + judge.batch]
                found = judge([self.drawn.picture(one) for one in some])
                check_scores(f"metrics {self.metric.name}", found, len(some))
                self.scores |= zip((one.file for one in some), found, strict=True)
                done += len(some)
                if done - saved >= SAVED:
                    write_scores(self.path, self.scores)
                    saved = done
                self._told(done, len(missing))
        finally:
            if done > saved:
                write_scores(self.path, self.scores)
        files = [one.file for one in self.drawn.records]
        return Measured(self.metric, {file: self.scores[file] for file in files}, notes=self._notes())

    def arms(self) -> Measured:
        by_arm: dict[str, list[Record]] = {}
        for one in self.drawn.records:
            by_arm.setdefault(one.arm, []).append(one)
        sizes = {len(records) for records in by_arm.values()}
        if min(sizes) < 2:
            raise SoftREPAError(f"metrics {self.metric.name} has 1 picture in an arm, expected 2 or more.")
        found = {}
        for number, (arm, records) in enumerate(by_arm.items(), 1):
            key = short_hash("\n".join(one.file for one in records))
            if key not in self.scores:
                images = (self.drawn.picture(one).image() for one in records)
                distance = self._opened(records).distance(images)
                check_scores(f"metrics {self.metric.name}", [distance], 1)
                self.scores[key] = distance
                write_scores(self.path, self.scores)
            found[arm] = self.scores[key]
            self._told(number, len(by_arm))
        few = f"of {min(sizes):,} pictures; of fewer than {FEW_FOR_FID:,} its value depends on their number"
        return Measured(self.metric, of_arms=found, notes=(few,) if min(sizes) < FEW_FOR_FID else ())

    def _opened(self, records: Sequence[Record] = ()):
        if self.judge is None:
            self.tell(f"{self.metric.title}: loading")
            self.judge = judge_of(self.metric, self.weights, self.options)
            if records:
                self.judge.photographs(self._photographs(records))
            else:
                self._keep_notes(self.judge.notes([one.text for one in self.drawn.records]))
        return self.judge

    def _photographs(self, records: Sequence[Record]):
        """Each once, at the size of the pictures."""
        size = self.drawn.picture(records[0]).image().size
        for photograph in self.drawn.photographs.values():
            assert photograph is not None  # checked before anything was drawn
            yield sized(photograph, size)

    def _keep_notes(self, notes: list[str]) -> None:
        """Beside the scores, for a run that finds all of these there."""
        write_text(self.notes, json.dumps(notes))

    def _notes(self) -> tuple[str, ...]:
        return tuple(parse_json(read_bounded(self.notes, MOST_NOTES))) if is_file(self.notes) else ()

    def _told(self, done: int, total: int) -> None:
        left = (time.monotonic() - self.started) / done * (total - done)
        self.tell(f"{self.metric.title}: {done:,} of {total:,} judged, {time_left(left)} left")


def weights_key(path: Path) -> str:
    """Which weights: the names and stamps of their files."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    facts = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files if one.exists()]
    return hashlib.sha256(json.dumps([str(path), facts]).encode()).hexdigest()[:16]
