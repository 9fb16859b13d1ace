"""A training run from the inputs that people give: the node's widgets, or a configuration file of the same names."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ...data.dataset import Dataset
from ...errors import SoftREPAError
from ...training.inputs import TrainingInputs
from ...training.ranks import ALONE, Ranks
from .. import folders
from ..families import model_shape
from .live import Live
from .reports import Curves, LogFile, Measured, Samples
from .run import Trained, train
from .score import HeldOut
from .session import ELSEWHERE, Report, RunFiles

VALIDATION_BATCHES = 16
PREVIEW_STEPS = 20


def launch(
    model,
    dataset: Dataset,
    say: Callable[[str], None],
    inputs: TrainingInputs,
    send: Callable[[dict], None] | None = None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Trains, with everybody who looks at it; what others may write is claimed until it ends. Raises SoftREPAError.

    send: gets the run's numbers, to draw them; without it the curves are a picture in the node. Of several processes,
    `ranks`, only the first one writes.
    """
    held_out = None
    if dataset.validation:
        config = inputs.config
        held_out = HeldOut(dataset, config.batch_size, VALIDATION_BATCHES, config.seed)
    if inputs.has_preview:
        check_preview(model, inputs)
    with ExitStack() as held:
        reports = partial(reports_of, inputs, dataset, held_out, send)
        files = run_files(inputs, held) if ranks.is_first else [ELSEWHERE]
        return train(model, dataset, inputs, files, reports, say, ranks)


def run_files(inputs: TrainingInputs, held: ExitStack) -> list[RunFiles]:
    """Of a new run, or of those that may be gone on with, the newest first; released when `held` ends."""

    def claim(tokens: Path) -> str:
        """Until the run ends, however it does."""
        return held.enter_context(folders.claimed(tokens))

    prefix = inputs.filename_prefix
    earlier = [folders.tokens_of_state(path) for path in folders.states(prefix)] if inputs.resume else []
    paths = earlier or [folders.reserved_token_path(prefix)]
    for path in paths:
        held.callback(folders.release, path)
    every = inputs.checkpoint_every
    return [RunFiles(path, folders.state_path(path), not earlier, every, partial(claim, path)) for path in paths]


def reports_of(
    inputs: TrainingInputs,
    dataset: Dataset,
    held_out: HeldOut | None,
    send: Callable[[dict], None] | None,
    files: RunFiles,
) -> list[Report]:
    """Who looks at a run, in the order in which they do."""
    found: list[Report] = [] if held_out is None else [Measured(held_out, inputs.preview_every)]
    if files is ELSEWHERE:
        return found
    logs = folders.log_folder(files.tokens)
    found.append(LogFile(logs / "steps.csv"))
    if inputs.has_preview:
        size = dataset.first_latent().shape
        prompts = (inputs.preview_positive, inputs.preview_negative)
        found.append(Samples(*prompts, inputs.vae, size, inputs.preview_cfg, PREVIEW_STEPS, inputs.preview_every, logs))
    if send is not None:
        found.append(Live(send))
    return [*found, Curves(logs / "curves.png", is_shown=send is None)]


def check_preview(model, inputs: TrainingInputs) -> None:
    """A preview that cannot work is refused before hours have passed."""
    family = model_shape(model).family
    expected = family.text_width
    for name in ("preview_positive", "preview_negative"):
        cond = getattr(inputs, name)
        if not cond or expected not in (None, cond[0][0].shape[-1]):
            found = f"text of width {cond[0][0].shape[-1]}" if cond else "nothing"
            raise SoftREPAError(f"{name} holds {found}, expected width {expected} for {family.title}.")
    channels, of_vae = model.model.latent_format.latent_channels, getattr(inputs.vae, "latent_channels", None)
    if of_vae not in (None, channels):
        raise SoftREPAError(f"vae has {of_vae} latent channels, expected {channels} for {family.title}.")
