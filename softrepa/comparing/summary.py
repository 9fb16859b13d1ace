"""What the scores of compared pictures say: each arm's mean, and its paired difference from the first arm."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import SoftREPAError, shown
from ..statistics import Difference, Figures, Unit, paired_difference, verdict
from .records import Record

COLUMNS = (
    "judge", "arm", "pictures", "prompts", "mean", "difference", "low", "high", "prompts_needed", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """A judge's scores by the pictures' files. `note` says how it judged; more is better unless `less_is_better`."""

    title: str
    unit: Unit
    scores: Mapping[str, float]
    note: str = ""
    less_is_better: bool = False


@dataclass(frozen=True)
class Line:
    """One arm before one judge. The baseline has no difference."""

    judge: Judged
    arm: str
    mean: float
    pictures: int
    prompts: int
    difference: Difference | None

    def sentence(self, baseline: str) -> str:
        return verdict(self.difference, self.judge.unit, baseline) if self.difference else ""


def numbered(judged: Sequence[Judged]) -> list[Judged]:
    """Judges of one title get a number, the first one excepted: their figures would stand under one head."""
    titles: Counter[str] = Counter()
    found = []
    for one in judged:
        titles[one.title] += 1
        found.append(one if titles[one.title] == 1 else replace(one, title=f"{one.title} {titles[one.title]}"))
    return found


def summarize(records: Sequence[Record], judged: Judged) -> list[Line]:
    """A line for each arm that has scores, in the order of the records. The arm of the first record is the baseline.

    A prompt's pictures are averaged first, as in the differences.
    """
    figures = by_arm(records, judged.scores)
    baseline = figures.get(records[0].arm, {}) if records else {}
    return [
        Line(
            judged,
            arm,
            mean_of_prompts(scores),
            len(scores),
            len({prompt for prompt, _ in scores}),
            None if scores is baseline or not scores.keys() & baseline.keys() else paired_difference(scores, baseline),
        )
        for arm, scores in figures.items()
    ]


def by_arm(records: Iterable[Record], scores: Mapping[str, float]) -> dict[str, Figures]:
    """Scores by prompt and seed, of each arm that has some."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for one in records:
        if one.file in scores:
            found.setdefault(one.arm, {})[one.pair] = scores[one.file]
    return dict(found)


def mean_of_prompts(scores: Figures) -> float:
    by_prompt: dict[int, list[float]] = {}
    for (prompt, _), score in scores.items():
        by_prompt.setdefault(prompt, []).append(score)
    return math.fsum(math.fsum(values) / len(values) for values in by_prompt.values()) / len(by_prompt)


def as_text(lines: Sequence[Line]) -> str:
    """For a person: a paragraph for each judge."""
    paragraphs: dict[str, list[str]] = {}
    for line in lines:
        judge = line.judge
        note = "; ".join(filter(None, (judge.note, "less is better" if judge.less_is_better else "")))
        head = f"{judge.title}{f' ({note})' if note else ''}"
        said = f"{line.arm}: {judge.unit.figure(line.mean)}"
        if line.difference is not None:
            said += f", {line.sentence(lines[0].arm)}"
        paragraphs.setdefault(head, []).append(said)
    return "\n\n".join("\n".join([head, *said]) for head, said in paragraphs.items())


def as_rows(lines: Sequence[Line]) -> list[list[object]]:
    """For a program, below COLUMNS; what cannot be said is empty."""
    rows: list[list[object]] = []
    for line in lines:
        found = line.difference
        change: list[object] = ["", "", "", "", ""]
        if found is not None:
            low, high = (value if math.isfinite(value) else "" for value in (found.low, found.high))
            change = [found.mean, low, high, found.needed() or "", line.sentence(lines[0].arm)]
        rows.append([line.judge.title, line.arm, line.pictures, line.prompts, line.mean, *change])
    return rows


def as_csv(lines: Sequence[Line]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(as_rows(lines))
    return text.getvalue()


def check_scores(name: str, scores: Sequence[float], pictures: int) -> None:
    """Of a list from outside: one finite number for each picture."""
    if len(scores) != pictures:
        raise SoftREPAError(f"{name} has {len(scores)} scores, expected {pictures}: one for each picture.")
    wrong = next((score for score in scores if not math.isfinite(score)), None)
    if wrong is not None:
        raise SoftREPAError(f"{name} holds {shown(wrong)}, expected finite numbers.")
