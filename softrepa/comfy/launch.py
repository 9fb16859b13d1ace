"""A training run from the inputs that people give: the node's widgets, or a configuration file of the same names."""

import json
from collections.abc import Callable

from ..dataset import Dataset
from ..errors import SoftREPAError
from ..tokens import SoftTokens
from ..trainer import TrainingConfig
from . import folders
from .reports import Curves, HeldOut, LogFile, Samples
from .score import held_out
from .training import Files, Run, TokenPlan, train

TIME_TABLE = {"auto": None, "on": True, "off": False}
VALIDATION_BATCHES = 16
PREVIEW_STEPS = 20


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
    **options,
) -> Run:
    """0, -1 and "auto" mean the family's recipe; `options` are those of `TrainingConfig`. Raises SoftREPAError."""
    config = TrainingConfig(**options, denoising_weight=None if denoising_weight < 0 else denoising_weight)
    if time_table not in TIME_TABLE:
        raise SoftREPAError(f'time_table is "{time_table}", expected one of {", ".join(TIME_TABLE)}.')
    plan = TokenPlan(n_tokens or None, None if blocks == "auto" else blocks, TIME_TABLE[time_table])
    preview = {"preview_positive": preview_positive, "preview_negative": preview_negative, "vae": vae}
    missing = [name for name, value in preview.items() if value is None]
    if missing and len(missing) < len(preview):
        raise SoftREPAError(f"{', '.join(missing)} is not connected, expected all of {', '.join(preview)} or none.")
    found = folders.newest_checkpoint(filename_prefix) if resume else None
    path = folders.tokens_of_checkpoint(found) if found else folders.new_token_path(filename_prefix)
    logs = folders.log_folder(path)
    reports = []
    if dataset.validation:
        batches = held_out(dataset, config.batch_size, VALIDATION_BATCHES, config.seed)
        reports.append(HeldOut(batches, preview_every))
    reports.append(LogFile(logs / "steps.csv"))
    if not missing:
        size = dataset.encodings.latent(dataset.train[0]).shape
        prompts = (preview_positive, preview_negative)
        reports.append(Samples(*prompts, vae, size, preview_cfg, PREVIEW_STEPS, preview_every, logs))
    reports.append(Curves(logs / "curves.png", is_shown=bool(missing)))
    given = options | {
        "n_tokens": n_tokens,
        "blocks": blocks,
        "time_table": time_table,
        "denoising_weight": denoising_weight,
        "filename_prefix": filename_prefix,
    }
    return train(
        model,
        dataset,
        config,
        plan,
        Files(path, folders.checkpoint_path(path), checkpoint_every),
        init_tokens=init_tokens,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        resume=found is not None,
        reports=reports,
        metadata={"inputs": json.dumps(given | dataset.settings, sort_keys=True)},
        on_progress=say,
    )
