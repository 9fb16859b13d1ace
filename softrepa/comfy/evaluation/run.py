"""An evaluation from its CONFIG to its table. ComfyUI must be started."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...comparing.inputs import MOST_SEEDS, CompareInputs, parse_seeds
from ...comparing.plan import check_count
from ...comparing.records import Arm, Record, file_name, record, short_hash, write_records, write_whole
from ...configuration import CLIP
from ...data.latent_lists import PIXELS
from ...data.sources import Source
from ...errors import SoftREPAError, shown
from ...evaluation.captions import Caption, Edit, check_photographs, paired_edits, read_captions, read_edits
from ...evaluation.inputs import EvaluateInputs, arms_of, edit_arms_of, photograph_folder
from ...evaluation.measuring import Drawn, measure
from ...evaluation.metrics import JudgeOptions, check_metric
from ...evaluation.pictures import photograph_key
from ...evaluation.presets import published
from ...evaluation.ranks import Rank, wait_for_others
from ...evaluation.report import CURVE, TABLE, Report, curve
from ...tokens import SoftTokens
from ...training.identity import tokens_hash
from .. import headless
from ..comparing.drawing import Painter
from ..families import model_shape
from ..identity import clip_identity, model_identity, vae_identity
from ..models import check_fit, check_positions
from ..tokens.patching import apply_tokens
from .drawing import Prompts, draw_missing
from .editing import Editor

FOLDER = "softrepa_evaluation"
"""In ComfyUI's output folder, where CONFIG names no other."""
LPIPS_SIDE = 299
"""Pixels to which the paper's script resizes a drawn picture and its photograph."""
MOST_SEED = 2**64
Tell = Callable[[str], None]


def evaluate(inputs: EvaluateInputs, name: str, download: bool, tell: Tell) -> Path:
    """Draws, judges and writes what is not there yet; returns the table. `name` is that of its folder."""
    rank = Rank.of_environment()
    task: Task = Edits(inputs) if inputs.is_of_edits else Captions(inputs)
    tell(f"{task.title} of {shown(inputs.checkpoint)}")
    options = JudgeOptions(
        memory.get_torch_device(),
        None if inputs.is_of_edits else LPIPS_SIDE,
        inputs.lpips_net,
        inputs.hps_architecture,
        inputs.imagereward_python,
        download,
    )
    if rank.is_first:
        for metric in inputs.chosen_metrics.values():
            check_metric(metric, Path(inputs.metrics[metric.name]), options)
    folder = Path(inputs.output or Path(folder_paths.get_output_directory()) / FOLDER / name)
    with torch.inference_mode():
        studio = Studio.of(inputs)
        check_count(len(task.arms), len(task.photographs), len(parse_seeds(inputs.seeds)))
        records = task.records(studio)
        if rank.is_first:
            write_records(folder, records)
        own = rank.share(records)
        with without_bars():
            draw_missing(folder, own, task.drawer(studio, own), tell)
    if not rank.is_first:
        return folder
    wait_for_others(folder, records, tell)
    memory.unload_all_models()
    memory.soft_empty_cache()
    drawn = Drawn(folder, records, task.photographs)
    measured = [
        measure(drawn, metric, Path(inputs.metrics[metric.name]), options, tell)
        for metric in inputs.chosen_metrics.values()
    ]
    figures = published(inputs.preset, inputs.family, inputs.is_of_edits, asdict(inputs))
    report = Report(inputs, records, measured, figures, task.notes)
    report.write(folder)
    if (plot := task.plot(report)) is not None:
        write_whole(folder / CURVE, lambda temporary: plot.save(temporary, "PNG"))
    return folder / TABLE


@contextmanager
def without_bars():
    """Keeps samplers from showing each step: a line tells of each picture."""
    before = comfy.utils.PROGRESS_BAR_ENABLED
    comfy.utils.set_progress_bar_enabled(False)
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_enabled(before)


@dataclass(frozen=True)
class Studio:
    """What draws: the plain model, its encoders, and the tokens by their files."""

    inputs: EvaluateInputs
    model: ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    tokens: dict[str, SoftTokens]

    @classmethod
    def of(cls, inputs: EvaluateInputs) -> "Studio":
        """Raises SoftREPAError for what does not fit together, before anything is drawn."""
        for name, known in (
            ("sampler_name", comfy.samplers.SAMPLER_NAMES),
            ("scheduler", comfy.samplers.SCHEDULER_NAMES),
        ):
            if getattr(inputs, name) not in known:
                raise SoftREPAError(f'{name} is "{shown(getattr(inputs, name))}", expected one of {", ".join(known)}.')
        tokens = {file: headless.load_tokens(file) for file, _ in arms_of(inputs).values() if file}
        model, clip, vae = headless.load_checkpoint(inputs.checkpoint)
        for one in tokens.values():
            check_fit(one, model_shape(model))
        check_positions("A picture", model, inputs.width // PIXELS, inputs.height // PIXELS)
        return cls(inputs, model, headless.set_clip({name: getattr(inputs, name) for name in CLIP}, clip), vae, tokens)

    def patched(self, file: str, strength: float) -> ModelPatcher:
        return apply_tokens(self.model, self.tokens[file], strength) if file else self.model

    def settings(self, file: str, strength: float) -> dict[str, Any]:
        """All that decides a picture beside prompt and seed."""
        return {**self.inputs.drawn, **self._identity, "strength": strength,
                "tokens": tokens_hash(self.tokens[file]) if file else ""}  # fmt: skip

    @cached_property
    def _identity(self) -> dict[str, str]:
        return {
            "model": model_identity(self.model),
            "clip": clip_identity(self.clip),
            "vae": vae_identity(self.vae),
        }


class Captions:
    """Text to image: a picture of each caption, by each arm."""

    title = "pictures"

    def __init__(self, inputs: EvaluateInputs):
        self.inputs = inputs
        found, left_out = read_captions(Path(inputs.captions), photograph_folder(inputs))
        self.captions: list[Caption] = found[: inputs.count or None]
        self.arms = arms_of(inputs)
        needing = [metric.name for metric in inputs.chosen_metrics.values() if metric.needs_photographs]
        check_photographs(self.captions, needing)
        self.notes = [left_out] if left_out else []

    @property
    def photographs(self) -> dict[int, Source | None]:
        return {number: caption.photograph for number, caption in enumerate(self.captions)}

    def records(self, studio: Studio) -> list[Record]:
        arms = [Arm(name, studio.settings(*way)) for name, way in self.arms.items()]
        return [
            record(arm, number, caption.text, seed_of(seed, number))
            for number, caption in enumerate(self.captions)
            for seed in parse_seeds(self.inputs.seeds)
            for arm in arms
        ]

    def drawer(self, studio: Studio, records: Sequence[Record]) -> Callable[[Record], Tensor]:
        models = {name: studio.patched(*way) for name, way in self.arms.items()}
        taken = {
            name: value for name, value in asdict(self.inputs).items() if name in CompareInputs.__dataclass_fields__
        }
        painter = Painter(models, studio.clip, studio.vae, CompareInputs(**taken))
        prompts = Prompts(self.inputs, studio.clip, (one.text for one in records))

        def draw(one: Record) -> Tensor:
            picture = painter.draw(one.arm, prompts.positive(one.text), prompts.negative, one.seed, None)
            return torch.from_numpy(picture)

        return draw

    def plot(self, report: Report):
        return None


class Edits:
    """FlowEdit of photographs, by each arm."""

    title = "edits"

    def __init__(self, inputs: EvaluateInputs):
        self.inputs = inputs
        images = photograph_folder(inputs)
        self.notes: list[str] = []
        if inputs.edits:
            found = read_edits(Path(inputs.edits), images)
        else:
            found, self.notes = paired_edits(Path(inputs.source_prompts), Path(inputs.target_prompts), images)
        self.edits: list[Edit] = found[: inputs.count or None]
        self.arms = {arm.name: arm for arm in edit_arms_of(inputs)}

    @property
    def photographs(self) -> dict[int, Source | None]:
        return {number: edit.photograph for number, edit in enumerate(self.edits)}

    def records(self, studio: Studio) -> list[Record]:
        """A file is named by its photograph, and by a hash of what this shows and of both prompts."""
        arms = [
            Arm(
                arm.name, studio.settings(arm.tokens, arm.strength) | {"n_max": arm.n_max, "target_cfg": arm.target_cfg}
            )
            for arm in self.arms.values()
        ]
        keys = [repr((photograph_key(edit.photograph), edit.source, edit.target)) for edit in self.edits]
        names = [f"{file_name(edit.name)}-{short_hash(key)}" for edit, key in zip(self.edits, keys, strict=True)]
        return [
            Record(arm.name, number, seed_of(seed, number), edit.target, f"{arm.folder}/{names[number]}_{seed}.png")
            for number, edit in enumerate(self.edits)
            for seed in parse_seeds(self.inputs.seeds)
            for arm in arms
        ]

    def drawer(self, studio: Studio, records: Sequence[Record]) -> Callable[[Record], Tensor]:
        models = {name: studio.patched(arm.tokens, arm.strength) for name, arm in self.arms.items()}
        editor = Editor(self.inputs, studio.clip, studio.vae, self.edits, records)
        return lambda one: editor.draw(models[one.arm], self.arms[one.arm], one)

    def plot(self, report: Report):
        return curve(report, list(self.arms.values()))


Task = Captions | Edits


def seed_of(seed: int, number: int) -> int:
    """Each prompt has noise of its own: with one for all of them their differences would not be independent."""
    return (seed + number * MOST_SEEDS) % MOST_SEED
