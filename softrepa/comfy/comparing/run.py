"""A comparison from its inputs to its table: what is drawn, in which folder, and what the judges say of it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import comfy.sd
import folder_paths
import numpy as np
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from PIL import Image

from ...comparing import summary
from ...comparing.grid import draw_grid
from ...comparing.inputs import CompareInputs, Prompt, number_text, parse_seeds, parse_strengths
from ...comparing.judging import Judge, judge_pictures
from ...comparing.plan import plan, shown_of
from ...comparing.records import Arm, Record, is_drawn, read_picture, write_csv, write_records, write_text, write_whole
from ...comparing.summary import Judged, Line, numbered, summarize
from ...data.latent_lists import PIXELS
from ...errors import SoftREPAError, shown
from ...files import is_file
from ...tokens import SoftTokens
from ...training.identity import tokens_hash
from ..families import model_shape
from ..folders import is_file_name, is_inside
from ..identity import clip_identity, model_identity, vae_identity
from ..models import check_positions
from ..tokens.call_state import KEY
from ..tokens.patching import TokenSet, apply_tokens
from .drawing import Painter, Told, draw_missing

FOLDER = "softrepa_compare"
"""In ComfyUI's output folder."""
SETTINGS = ("steps", "cfg", "sampler_name", "scheduler", "width", "height", "negative_prompt")
"""Inputs that decide how a picture looks, in every arm."""
SECOND_MODEL = "second model"
PROMPT_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Ways:
    """What is compared: the plain model, tokens on it and, if given, another model and other tokens."""

    model: ModelPatcher
    tokens: SoftTokens
    second_model: ModelPatcher | None = None
    second_tokens: SoftTokens | None = None

    def models(self, strengths: Sequence[float]) -> dict[str, ModelPatcher]:
        """By the arm's name; the first is what the others are compared with. Raises SoftREPAError."""
        if self.model.get_attachment(KEY) is not None:
            raise SoftREPAError("Model has soft tokens on it, expected the plain model: strengths adds them.")
        found = {arm_name(strength): apply_tokens(self.model, self.tokens, strength) for strength in strengths}
        if self.second_tokens is not None:
            found |= {
                f"second tokens, {arm_name(strength)}": apply_tokens(self.model, self.second_tokens, strength)
                for strength in strengths
                if strength
            }
        if self.second_model is not None:
            ours, theirs = model_shape(self.model), model_shape(self.second_model)
            if theirs.family is not ours.family:
                raise SoftREPAError(
                    f"second_model is {theirs.text}, expected one that clip and vae fit, as {ours.text}."
                )
            found[SECOND_MODEL] = self.second_model
        return found


def _settings_of(one: TokenSet) -> list[Any]:
    """What of tokens on a MODEL decides its pictures."""
    acts = (one.strength, one.start_percent, one.end_percent, one.apply_to, one.uncond_bank)
    return [tokens_hash(one.tokens), str(one.blocks), *acts, *(one.curve.facts if one.curve else ())]


def arm_name(strength: float) -> str:
    return f"strength {number_text(strength)}"


@dataclass(frozen=True)
class Comparison:
    """`graph` says what the graph feeds an input, by its name: what no weight shows decides a picture too."""

    ways: Ways
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    prompts: Sequence[Prompt]
    inputs: CompareInputs
    judges: Sequence[Judge] = ()
    graph: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> ModelPatcher:
        return self.ways.model

    @cached_property
    def models(self) -> dict[str, ModelPatcher]:
        return self.ways.models(parse_strengths(self.inputs.strengths))

    @cached_property
    def folder(self) -> Path:
        return compare_folder(self.inputs.filename_prefix)

    @cached_property
    def arms(self) -> list[Arm]:
        return [Arm(name, self._settings(name, model)) for name, model in self.models.items()]

    @cached_property
    def records(self) -> list[Record]:
        return plan(self.arms, [one.text for one in self.prompts], parse_seeds(self.inputs.seeds))

    @property
    def shown(self) -> list[Record]:
        return shown_of(self.records, len(self.arms), self.inputs.shown)

    @property
    def identity(self) -> str:
        """Of the plain model with what is on it, and of what encodes for it."""
        return json.dumps(self.arms[0].settings, sort_keys=True)

    @cached_property
    def _encoders(self) -> dict[str, str]:
        return {"clip": clip_identity(self.clip), "vae": vae_identity(self.vae)}

    def _settings(self, name: str, model: ModelPatcher) -> dict[str, Any]:
        """All that decides an arm's pictures beside prompt and seed."""
        attached, inputs = model.get_attachment(KEY), asdict(self.inputs)
        used = ("clip", "vae", "second_model" if name == SECOND_MODEL else "model")
        return {
            **{key: inputs[key] for key in SETTINGS},
            **self._encoders,
            "model": model_identity(model),
            "tokens": [_settings_of(one) for one in attached.sets] if attached else [],
            "graph": {key: self.graph.get(key, "") for key in used},
        }

    def check(self) -> None:
        """Raises SoftREPAError for what cannot be drawn or judged, before anything is."""
        for name in ("width", "height"):
            side = getattr(self.inputs, name)
            if side < PIXELS or side % PIXELS:
                raise SoftREPAError(f"{name} is {side}, expected a multiple of {PIXELS}, such as 512 or 1024.")
        for model in self.models.values():
            check_positions("A picture", model, self.inputs.width // PIXELS, self.inputs.height // PIXELS)
        for judge in self.judges:
            judge.check(self)


@dataclass(frozen=True)
class Outcome:
    """What a comparison found; `lines` are empty without a judge."""

    folder: Path
    records: Sequence[Record]
    shown: Sequence[Record]
    lines: Sequence[Line]
    grid: Image.Image

    @property
    def text(self) -> str:
        told = summary.as_text(self.lines) if self.lines else "No judge is connected: nothing is scored."
        return f"{told}\n\n{len(self.records):,} pictures in {shown(self.folder)}"

    @property
    def difference(self) -> float:
        """The first judge's, of the last arm; NaN where none was judged."""
        changes = [line.difference for line in self.lines if line.judge is self.lines[0].judge and line.difference]
        return changes[-1].mean if changes else float("nan")

    def images(self) -> np.ndarray:
        """(N, H, W, 3) of those that are shown."""
        return np.stack([read_picture(self.folder, one) for one in self.shown])


def compare(comparison: Comparison, tell: Told = lambda text: None) -> Outcome:
    """Draws what is not there yet, asks the judges, and writes grid and tables into the comparison's folder."""
    comparison.check()
    folder, records = comparison.folder, comparison.records
    write_records(folder, records)
    painter = Painter(comparison.models, comparison.clip, comparison.vae, comparison.inputs)
    draw_missing(painter, folder, records, tell, partial(compared_with, comparison))
    judged = numbered([_judged(judge, comparison, tell) for judge in comparison.judges])
    lines = [line for one in judged for line in summarize(records, one)]
    grid = draw_grid(comparison.shown, reader(folder), head_of(lines), shown_scores(comparison.shown, judged))
    write_whole(folder / "grid.png", lambda temporary: grid.save(temporary, "PNG"))
    write_tables(folder, records, judged, lines)
    ProgressBar(1).update_absolute(1, 1, ("JPEG", grid, None))  # a node goes on showing its last preview
    return Outcome(folder, records, comparison.shown, lines, grid)


def _judged(judge: Judge, comparison: Comparison, tell: Told) -> Judged:
    bar = ProgressBar(1)

    def tick(done: int, total: int) -> None:
        memory.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)
        tell(f"{judge.title}: {done:,} of {total:,} pictures judged")

    return judge_pictures(judge, comparison, comparison.folder, comparison.records, tick)


def reader(folder: Path) -> Callable[[Record], np.ndarray | None]:
    return lambda one: read_picture(folder, one) if is_drawn(folder, one) else None


def compared_with(comparison: Comparison, drawn: Record) -> Image.Image:
    """A picture beside those of other arms so far, to be looked at while the rest is drawn."""
    per_prompt = len(comparison.records) // len(comparison.prompts)
    start = drawn.prompt * per_prompt
    pair = [one for one in comparison.records[start : start + per_prompt] if one.seed == drawn.seed]
    return draw_grid(pair, reader(comparison.folder))


def head_of(lines: Sequence[Line]) -> str:
    """The verdicts, above the grid."""
    return summary.as_text(lines) if lines else ""


def shown_scores(records: Iterable[Record], judged: Sequence[Judged]) -> dict[str, str]:
    """Below each picture, the first judge's."""
    if not judged:
        return {}
    first = judged[0]
    return {one.file: first.unit.figure(first.scores[one.file]) for one in records if one.file in first.scores}


def write_tables(folder: Path, records: Sequence[Record], judged: Sequence[Judged], lines: Sequence[Line]) -> None:
    """scores.csv has a line for each picture, summary.csv one for each arm and judge, summary.txt what it says."""
    heads = ["arm", "prompt", "seed", "text", "file", *(one.title for one in judged)]
    rows = (
        [one.arm, one.prompt, one.seed, one.text, one.file, *(each.scores.get(one.file, "") for each in judged)]
        for one in records
    )
    write_csv(folder / "scores.csv", heads, rows)
    write_csv(folder / "summary.csv", summary.COLUMNS, summary.as_rows(lines))
    write_text(folder / "summary.txt", summary.as_text(lines) + "\n")


def compare_folder(filename_prefix: str) -> Path:
    """A folder below softrepa_compare in ComfyUI's output folder. Raises SoftREPAError for a place outside."""
    root = Path(folder_paths.get_output_directory()) / FOLDER
    parts = Path(filename_prefix).parts
    folder = root / filename_prefix
    if not parts or not all(map(is_file_name, parts)) or not is_inside(folder, root):
        raise SoftREPAError(
            f'filename_prefix is "{shown(filename_prefix)}", expected the name of a folder inside {FOLDER} in '
            "ComfyUI's output folder."
        )
    return folder


def graph_of(prompt: Mapping[str, Any] | None, node: str | None, names: Iterable[str]) -> dict[str, str]:
    """A hash of all nodes and values that lead to each of a node's inputs, in a graph as ComfyUI's API takes it.

    Empty where the node is not in the graph.
    """
    graph = prompt or {}
    known: dict[str, str] = {}

    def is_link(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in graph

    def identity(value: Any) -> Any:
        return [known.get(value[0], ""), value[1]] if is_link(value) else value  # a circle ends here

    def hashed(name: str) -> str:
        inputs = {key: identity(value) for key, value in sorted(graph[name].get("inputs", {}).items())}
        said = json.dumps([graph[name].get("class_type"), inputs], sort_keys=True, default=str)
        return hashlib.sha256(said.encode("utf-8", "backslashreplace")).hexdigest()[:16]

    given = graph.get(node or "", {}).get("inputs", {})
    inputs = {name: given[name] for name in names if name in given}
    # Not by recursion: a loop of ComfyUI puts the nodes of all its rounds behind one another.
    waiting: list[str] = [value[0] for value in inputs.values() if is_link(value)]
    entered: set[str] = set()
    while waiting:
        name = waiting[-1]
        if name not in entered:
            entered.add(name)
            links = filter(is_link, graph[name].get("inputs", {}).values())
            waiting.extend(link[0] for link in links if link[0] not in entered)
        else:
            waiting.pop()
            known.setdefault(name, hashed(name))
    return {name: json.dumps(identity(value), default=str) for name, value in inputs.items()}


def prompt_files() -> list[str]:
    """Files in the input folder that may hold prompts; not below it, where captions lie beside their images."""
    files = Path(folder_paths.get_input_directory()).glob("*")
    return sorted(path.name for path in files if path.suffix.lower() in PROMPT_SUFFIXES and is_file(path))
