"""A training run from the inputs that people give: the node's widgets, or a configuration file of the same names."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ...data.dataset import Dataset
from ...errors import SoftREPAError, shown
from ...tokens import SoftTokens
from ...training.config import TrainingConfig
from ...training.presets import with_preset
from .. import folders
from ..families import model_shape
from .reports import Curves, LogFile, Measured, Samples
from .run import Run, TokenPlan, train
from .score import HeldOut
from .session import Files, Report

TIME_TABLE = {"auto": None, "on": True, "off": False}
VALIDATION_BATCHES = 16
PREVIEW_STEPS = 20
MOST_CFG = 100


def launch(
    model,
    dataset: Dataset,
    say: Callable[[str], None],
    *,
    n_tokens: int = 0,
    blocks: str = "auto",
    time_table: str = "auto",
    denoising_weight: float = -1.0,
    micro_batch: int = 0,
    checkpoint_every: int = 500,
    filename_prefix: str = "trained",
    init_tokens: SoftTokens | None = None,
    checkpointing: bool = True,
    preview_positive=None,
    preview_negative=None,
    vae=None,
    preview_every: int = 500,
    preview_cfg: float = 4.0,
    resume: bool = False,
    preset: str = "paper",
    **options,
) -> Run:
    """0, -1 and "auto" mean the family's recipe; `options` are those of `TrainingConfig`. Raises SoftREPAError."""
    least = {"n_tokens": 0, "micro_batch": 0, "checkpoint_every": 0, "preview_every": 1}
    for (name, low), value in zip(least.items(), (n_tokens, micro_batch, checkpoint_every, preview_every), strict=True):
        if value < low:
            raise SoftREPAError(f"{name} is {value}, expected {low} or more.")
    if denoising_weight < 0 and denoising_weight != -1:
        raise SoftREPAError(f"denoising_weight is {denoising_weight:g}, expected 0 or more, or -1.")
    if not 1 <= preview_cfg <= MOST_CFG:  # nor NaN, which ComfyUI lets through
        raise SoftREPAError(f"preview_cfg is {preview_cfg:g}, expected 1 to {MOST_CFG}.")
    options = with_preset(preset, options)
    config = TrainingConfig(**options, denoising_weight=None if denoising_weight < 0 else denoising_weight)
    if time_table not in TIME_TABLE:
        raise SoftREPAError(f'time_table is "{shown(time_table)}", expected one of {", ".join(TIME_TABLE)}.')
    plan = TokenPlan(
        n_tokens or None,
        None if blocks == "auto" else blocks,
        TIME_TABLE[time_table],
        two_banks=config.objective == "agsm",
    )
    preview = {"preview_positive": preview_positive, "preview_negative": preview_negative, "vae": vae}
    missing = [name for name, value in preview.items() if value is None]
    if missing and len(missing) < len(preview):
        raise SoftREPAError(f"{', '.join(missing)} is not connected, expected all of {', '.join(preview)} or none.")
    batches = None
    if dataset.validation:
        batches = HeldOut(dataset, config.batch_size, VALIDATION_BATCHES, config.seed)
    if not missing:
        check_previews(model, preview_positive, preview_negative, vae)

    def reports(files: Files) -> list[Report]:
        logs = folders.log_folder(files.tokens)
        found: list[Report] = [] if batches is None else [Measured(batches, preview_every)]
        found.append(LogFile(logs / "steps.csv"))
        if not missing:
            size = dataset.encodings.latent(dataset.train[0]).shape
            prompts = (preview_positive, preview_negative)
            found.append(Samples(*prompts, vae, size, preview_cfg, PREVIEW_STEPS, preview_every, logs))
        return [*found, Curves(logs / "curves.png")]

    given = options | {
        "n_tokens": n_tokens,
        "blocks": blocks,
        "time_table": time_table,
        "denoising_weight": denoising_weight,
        "filename_prefix": filename_prefix,
    }
    if init_tokens is not None:
        given["init_tokens"] = init_tokens.name
    with ExitStack() as held:

        def claim(tokens: Path) -> str:
            """Until the run ends, however it does."""
            return held.enter_context(folders.claimed(tokens))

        earlier = (
            [folders.tokens_of_checkpoint(path) for path in folders.checkpoints(filename_prefix)] if resume else []
        )
        paths = earlier or [folders.reserved_token_path(filename_prefix)]
        for path in paths:
            held.callback(folders.release, path)
        runs = [Files(path, folders.checkpoint_path(path), checkpoint_every, partial(claim, path)) for path in paths]
        return train(
            model,
            dataset,
            config,
            plan,
            runs[0],
            resume=runs if earlier else (),
            init_tokens=init_tokens,
            micro_batch=micro_batch,
            checkpointing=checkpointing,
            reports=reports,
            metadata={"inputs": json.dumps(given | dataset.settings, sort_keys=True)},
            on_progress=say,
        )


def check_previews(model, positive, negative, vae) -> None:
    """A preview that cannot work is refused before hours have passed."""
    family = model_shape(model).family
    expected = family.text_width
    for name, cond in (("preview_positive", positive), ("preview_negative", negative)):
        if not cond or cond[0][0].shape[-1] != expected:
            found = f"text of width {cond[0][0].shape[-1]}" if cond else "nothing"
            raise SoftREPAError(f"{name} holds {found}, expected width {expected} for {family.title}.")
    channels, of_vae = model.model.latent_format.latent_channels, getattr(vae, "latent_channels", None)
    if of_vae not in (None, channels):
        raise SoftREPAError(f"vae has {of_vae} latent channels, expected {channels} for {family.title}.")
