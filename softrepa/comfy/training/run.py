"""A training run on a MODEL: it is prepared, put where an earlier one stopped, and run to a file at the end."""

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher

from ...data.dataset import Dataset
from ...errors import SoftREPAError
from ...tokens import SoftTokens
from ...training import state as training_state
from ...training.identity import file_metadata, run_identity
from ...training.inputs import CHECKPOINTING, TrainingInputs
from ...training.ranks import ALONE, Ranks
from ...training.trainer import StepRecord, Trainer
from ..families import ModelShape
from ..identity import model_identity
from ..models import check_fit
from .devices import check_alike, idle_devices
from .memory_use import AdaptivePairs, kept_bytes, largest_latent, load
from .preflight import check_dataset, check_gradients, checked_model
from .session import Parts, Report, RunFiles, Session
from .start import starting_tokens
from .trainable import TrainableNetwork


@dataclass(frozen=True)
class Trained:
    """What a finished run gives."""

    tokens: SoftTokens
    path: Path
    records: list[StepRecord]


def train(
    model: ModelPatcher,
    dataset: Dataset,
    inputs: TrainingInputs,
    candidates: Sequence[RunFiles],
    reports: Callable[[RunFiles], Sequence[Report]] = lambda files: (),
    say: Callable[[str], None] = lambda text: None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Learns tokens and writes them: every `checkpoint_every` steps, at the end, and when interrupted.

    dataset: see `softrepa.data.dataset`; latents are VAE latents, `process_latent_in` is done here. `candidates` are
    the files of a new run, or of those that may be gone on with, newest first. `ranks` are the processes that train
    together. Raises SoftREPAError.
    """
    shape = checked_model(model)
    check_dataset(dataset, model, inputs.config)
    dataset = dataset.started(inputs.config.seed)
    if inputs.config.hard_negatives:
        encoded = dataset.prepare_hard_negatives()
        logging.info("SoftREPA: %s", encoded)
        say(encoded)
    patcher = static_clone(model)
    with outside_inference(), cleaned_up(patcher):
        parts = prepare(patcher, shape, dataset, inputs, model_identity(model), ranks)
        return run(resume(parts, candidates, say), inputs, reports)


def prepare(
    patcher: ModelPatcher,
    shape: ModelShape,
    dataset: Dataset,
    inputs: TrainingInputs,
    trained_on: str,
    ranks: Ranks = ALONE,
) -> Parts:
    """Loads the model and makes the trainer on it. `trained_on` is the model's identity."""
    config = inputs.config
    start = starting_tokens(inputs, shape, dataset.empty)
    check_fit(start, shape)
    checkpointing = CHECKPOINTING[inputs.checkpointing]
    network = TrainableNetwork(patcher, start.blocks, checkpointing is not False)
    pairs = AdaptivePairs(network, is_auto=checkpointing is None)
    most_pairs = config.batch_size * (1 + config.wrong_captions)
    kept = kept_bytes(start.layers * start.count * shape.width, most_pairs)

    largest = largest_latent(dataset, patcher)

    def make_room():
        load(patcher, kept + pairs.needed_bytes(largest))

    make_room()
    patcher.pre_run()

    def next_batch(size):
        left = (config.steps - asking.step_index) * config.accumulation
        batch = dataset.batch(size, config.hard_negatives, config.negatives, left)
        make_room()  # encoding may have pushed it out
        return patcher.model.process_latent_in(batch.latents.clone()), [*batch.conds, *batch.further], batch.wrong

    trainer = Trainer(config, start, pairs, next_batch, dataset.empty, ranks)
    asking = weakref.proxy(trainer)  # a circle would keep model and data until Python looks for circles
    identity = run_identity(trainer.config, start, inputs.init_tokens is not None, dataset, trained_on)
    metadata = file_metadata(inputs, trainer.config, dataset, trained_on)
    return Parts(trainer, pairs, dataset, patcher, identity, metadata)


def resume(parts: Parts, candidates: Sequence[RunFiles], say: Callable[[str], None]) -> Session:
    """A session in new files, or where the newest run with the same settings stopped. Raises SoftREPAError."""
    check_alike(parts.trainer.ranks, parts.identity)
    if candidates[0].is_new:
        session = Session(parts, candidates[0], say)
    else:
        files, saved = same_run(candidates, parts.identity)
        session = Session(parts, files, say)
        session.go_on_from(saved)
    session.join()
    return session


def run(session: Session, inputs: TrainingInputs, reports: Callable[[RunFiles], Sequence[Report]]) -> Trained:
    """The steps that are left. What was learned is written however they end."""
    watching = reports(session.files)
    try:
        is_alone, is_of_a_folder = session.trainer.ranks.count == 1, "folder" in session.dataset.settings
        if is_alone and is_of_a_folder and (idle := idle_devices(session.files.tokens)):
            session.notice("devices", idle)
        check_gradients(session.parts, session.notice, inputs.on_no_contrast)
        session.run(inputs.micro_batch, watching)
    finally:
        session.finish(watching)
    return Trained(session.tokens(), session.files.tokens, session.records)


def same_run(candidates: Sequence[RunFiles], settings: dict) -> tuple[RunFiles, training_state.TrainingState]:
    """The newest of `candidates` with these settings. Raises SoftREPAError, naming what makes the newest another."""
    newest: list[str] = []
    for files in candidates:
        saved = training_state.load(files.state)
        changes = training_state.differences(saved.identity, settings)
        if not changes:
            return files, saved
        newest = newest or changes
    raise SoftREPAError(
        f"resume: {candidates[0].state.name} is of another run ({'; '.join(newest)}), "
        "expected the same settings, or resume off."
    )


def static_clone(model: ModelPatcher) -> ModelPatcher:
    """A clone whose weights stay where they are loaded, as autograd needs. Raises SoftREPAError where there is none."""
    is_dynamic = getattr(model, "is_dynamic", None)  # older versions know no other patcher
    if is_dynamic is None or not is_dynamic():
        return model.clone()
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise SoftREPAError(
            f"Model cannot be loaded without dynamic memory ({error}), expected one of ComfyUI's own loaders, or "
            "ComfyUI started with --disable-dynamic-vram."
        ) from None


@contextmanager
def cleaned_up(patcher: ModelPatcher):
    """Nothing of a run stays on the model that others share, however it ends."""
    try:
        yield
    finally:
        patcher.cleanup()


@contextmanager
def outside_inference():
    """Nodes run in inference mode; autograd does not."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
