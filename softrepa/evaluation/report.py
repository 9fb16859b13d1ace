"""results.json and results.md: each arm's mean by each metric, and its paired difference to the first arm."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import charts
from ..comparing.records import Record, write_text
from ..comparing.summary import Judged, Line, by_arm, summarize
from ..statistics import Unit, mean_interval
from .inputs import EditArm, EvaluateInputs
from .measuring import Measured

RESULTS, TABLE, CURVE = "results.json", "results.md", "curve.png"
Published = Mapping[str, Mapping[str, float]]


class Report:
    """What is known of an evaluation once it is judged. `notes` are for a person; nothing here depends on the clock."""

    def __init__(
        self,
        inputs: EvaluateInputs,
        records: Sequence[Record],
        measured: Sequence[Measured],
        published: Published,
        notes: Sequence[str],
    ):
        self.inputs, self.records, self.measured = inputs, records, measured
        self.published, self.notes = published, notes
        self.arms = list(dict.fromkeys(one.arm for one in records))
        self.lines = {
            one.metric.name: summarize(
                records, Judged(one.metric.title, Unit(), one.scores, less_is_better=one.metric.less_is_better)
            )
            for one in measured
            if one.scores
        }

    def write(self, folder: Path) -> None:
        write_text(folder / RESULTS, json.dumps(self.as_json(), indent=1) + "\n")
        write_text(folder / TABLE, self.as_markdown())

    def as_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.inputs),
            "arms": self.arms,
            "pictures": len(self.records),
            "prompts": len({one.prompt for one in self.records}),
            "metrics": {one.metric.name: self._metric(one) for one in self.measured},
            "notes": list(self.notes),
        }

    def _metric(self, one: Measured) -> dict[str, Any]:
        arms: dict[str, Any] = {arm: {"value": value} for arm, value in one.of_arms.items()}
        for line in self.lines.get(one.metric.name, ()):
            arms[line.arm] = {"value": line.mean, "pictures": line.pictures, "prompts": line.prompts}
            if line.difference is not None:
                arms[line.arm] |= {
                    "difference": line.difference.mean,
                    "low": finite(line.difference.low),
                    "high": finite(line.difference.high),
                    "prompts_needed": line.difference.needed(),
                }
        for arm, value in self._published(one).items():
            arms.setdefault(arm, {})["paper"] = value
        facts = {"title": one.metric.title, "less_is_better": one.metric.less_is_better, "notes": list(one.notes)}
        return facts | {"arms": arms}

    def _published(self, one: Measured) -> dict[str, float]:
        figures = {arm: self.published.get(arm, {}).get(one.metric.name) for arm in self.arms}
        return {arm: value for arm, value in figures.items() if value is not None}

    def as_markdown(self) -> str:
        prompts = len({one.prompt for one in self.records})
        seeds = len(self.records) // max(1, prompts * len(self.arms))
        each = "a picture" if seeds == 1 else f"{seeds} pictures"
        parts = [
            "# Evaluation",
            f"{prompts:,} prompts, {each} of each in every arm, the same noise in all arms.",
            self._table(),
        ]
        if self.published:
            parts.append("Behind a slash is the paper's figure.")
        parts += [self._differences(line[0].judge.title, line) for line in self.lines.values() if len(line) > 1]
        notes = [*self.notes, *(f"{one.metric.title}: {note}" for one in self.measured for note in one.notes)]
        if notes:
            parts.append("\n".join(f"- {note}" for note in notes))
        return "\n\n".join(parts) + "\n"

    def _table(self) -> str:
        heads = [f"{one.metric.title} {'↓' if one.metric.less_is_better else '↑'}" for one in self.measured]
        rows = [[arm, *(self._cell(one, arm) for one in self.measured)] for arm in self.arms]
        return table(["", *heads], rows)

    def _cell(self, one: Measured, arm: str) -> str:
        means = {line.arm: line.mean for line in self.lines.get(one.metric.name, ())} | dict(one.of_arms)
        published = self._published(one).get(arm)
        return figure(means[arm]) + (f" / {published:g}" if published is not None else "")

    def _differences(self, title: str, lines: Sequence[Line]) -> str:
        """With a 95% interval over prompts."""
        said = [f"- {line.arm}: {line.sentence(self.arms[0])}" for line in lines if line.difference is not None]
        return "\n".join([f"## {title}, difference to {self.arms[0]}", "", *said])


def curve(report: Report, arms: Sequence[EditArm], across: str = "lpips", up: str = "clip"):
    """The paper's figure 5: how near an edit is to its target over how far it is from its source.

    A line joins the target CFGs of a model and an n_max; bars are 95% intervals of the mean over edits. None without
    both metrics.
    """
    scores = {one.metric.name: by_arm(report.records, one.scores) for one in report.measured}
    if not {across, up} <= scores.keys():
        return None
    lines: dict[str, list[EditArm]] = {}
    for arm in sorted(arms, key=lambda arm: arm.target_cfg):
        lines.setdefault(arm.name.rpartition(", cfg ")[0], []).append(arm)
    drawn = []
    for name, cells in lines.items():
        xs, ys = ([scores[metric][cell.name] for cell in cells] for metric in (across, up))
        means = [mean_interval(prompt_means(values)) for values in ys]
        drawn.append(
            charts.Line(
                name,
                [float(f"{prompt_means(values).mean():.4g}") for values in xs],  # as the axis says them
                [mean for mean, *_ in means],
                [half if math.isfinite(half) else 0.0 for _, half, _ in means],
            )
        )
    return charts.draw([charts.Chart("CLIP of the target", "LPIPS", tuple(drawn))])


def prompt_means(scores: Mapping[tuple[int, int], float]):
    """A mean for each prompt."""
    by_prompt: dict[int, list[float]] = {}
    for (prompt, _), score in scores.items():
        by_prompt.setdefault(prompt, []).append(score)
    return torch.tensor([sum(values) / len(values) for values in by_prompt.values()], dtype=torch.float64)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.3f}"


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
