"""What a person sees of a training run while it goes on: curves, held-out figures, sample pictures, log files."""

import csv
import io
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import comfy.sample
import numpy as np
import torch
from PIL import Image

from ...charts import Chart, Line, draw, smooth
from ...files import read_bounded, write_atomically
from ...training.config import TrainingConfig
from ...training.loss import CROSS_ENTROPY, TEMPERATURE
from ...training.trainer import StepRecord
from ..data.encoding import decoded_still
from ..tokens.patching import apply_tokens
from .score import HeldOut, score
from .session import Report, Session

COLUMNS = ("step", "timestep", "loss", "accuracy", "matching_error", "gradient_norm")
HELD_OUT = ("held_out_accuracy", "held_out_loss")
MOST_LOGGED = 1 << 28
"""Bytes of a log: 200 for each of a million steps."""
SMOOTHED = 50
"""Steps that a point of a curve averages."""
SAMPLER = {"sampler_name": "euler", "scheduler": "normal"}


class LogFile(Report):
    """A line of numbers for each step in a .csv, and TensorBoard's event files where that package is installed."""

    def __init__(self, path: Path):
        self.path, self.is_open = path, False
        self.board: Any = None

    def after(self, record: StepRecord, session: Session) -> None:
        if not self.is_open:
            self.is_open = True
            write_atomically(self.path, lambda temporary: self._start(temporary, record.step))
            if find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.path.with_suffix("")), purge_step=record.step)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([*(getattr(record, name) for name in COLUMNS), *self._held_out(record, session)])
        if self.board is not None:
            for name in COLUMNS[2:]:
                self.board.add_scalar(f"training/{name}", getattr(record, name), record.step)
            for name, value in zip(HELD_OUT, self._held_out(record, session), strict=True):
                if value is not None:
                    self.board.add_scalar(f"held out/{name.removeprefix('held_out_')}", value, record.step)
            self.board.flush()

    def ended(self, session: Session) -> None:
        if self.board is not None:
            self.board.close()

    @staticmethod
    def _held_out(record: StepRecord, session: Session) -> tuple:
        """Accuracy and loss, if this step was followed by a measurement."""
        step, *found = session.held_out[-1] if session.held_out else (None, None, None)
        return tuple(found) if step == record.step else (None, None)

    def _start(self, target: Path, first: int) -> None:
        """The header and, of a run that is gone on with, the steps before `first`."""
        kept = []
        if self.path.exists():
            earlier = csv.reader(io.StringIO(read_bounded(self.path, MOST_LOGGED).decode(), newline=""))
            kept = [row for row in earlier if row and row[0].isdecimal() and int(row[0]) < first]
        with target.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([(*COLUMNS, *HELD_OUT), *kept])


class Measured(Report):
    """Loss and retrieval on batches that are not trained on, with the same noise each time."""

    is_shared = True

    def __init__(self, batches: HeldOut, every: int):
        self.batches, self.every = batches, every

    def after(self, record: StepRecord, session: Session) -> None:
        config = session.trainer.config
        if record.step % self.every and record.step != config.steps:
            return
        session.trainer.give_out()
        model = apply_tokens(session.model, session.tokens())
        temperature = config.temperature if is_papers_contrast(config) else TEMPERATURE
        measured = score(
            model,
            self.batches,
            seed=config.seed,
            temperature=temperature,
            logit_scale=config.logit_scale,
            ranks=session.trainer.ranks,
        )
        session.held_out.append((record.step, measured.accuracy, measured.loss))
        session.notice(
            "held out", f"step {record.step}, held out: loss {measured.loss:.4f}, retrieval {measured.accuracy:.0%}"
        )


def is_papers_contrast(config: TrainingConfig) -> bool:
    has_its_errors = config.objective == "contrastive" and config.contrast == CROSS_ENTROPY
    return has_its_errors and config.temperature_mode == "fixed"


def is_measured(config: TrainingConfig) -> bool:
    """Whether what is trained on is what is measured on held-out images, the contrast and nothing else."""
    return is_papers_contrast(config) and not config.denoising_weight and not config.guidance_weight


class Curves(Report):
    """Loss and retrieval, below the newest sample pictures, every few seconds; a file at every checkpoint.

    Where they are not `is_shown`, the sample pictures are alone.
    """

    def __init__(self, path: Path, is_shown: bool = True, seconds: float = 5.0):
        self.path, self.is_shown, self.seconds, self.drawn = path, is_shown, seconds, 0.0
        self.sample: Image.Image | None = None

    def after(self, record: StepRecord, session: Session) -> None:
        now, is_new = time.monotonic(), session.sample is not self.sample
        if is_new or (self.is_shown and now - self.drawn >= self.seconds):
            self.drawn, self.sample = now, session.sample
            self._show(session)
        if session.files.every and record.step % session.files.every == 0:
            self._save(curves(session))

    def ended(self, session: Session) -> None:
        if not session.records:
            return
        self._save(curves(session))
        self._show(session)

    def _show(self, session: Session) -> None:
        if self.is_shown:
            session.show(below(session.sample, curves(session)))
        elif session.sample is not None:
            session.show(session.sample)

    def _save(self, picture: Image.Image) -> None:
        write_atomically(self.path, lambda temporary: picture.save(temporary, "PNG"))


def below(sample: Image.Image | None, picture: Image.Image) -> Image.Image:
    """Both in one picture, as a node shows only one."""
    if sample is None:
        return picture
    height = round(sample.height * picture.width / sample.width)
    both = Image.new("RGB", (picture.width, height + picture.height))
    both.paste(sample.resize((picture.width, height)), (0, 0))
    both.paste(picture, (0, height))
    return both


def curves(session: Session) -> Image.Image:
    """Loss and in-batch retrieval over the steps, and held-out figures where there are some."""
    steps = [record.step for record in session.records]
    measured, *held_out = zip(*session.held_out, strict=True) if session.held_out else ((), (), ())
    accuracy, loss = (Line("held out", measured, column) for column in held_out)
    config, comparable = session.trainer.config, is_measured(session.trainer.config)
    chance = ("chance", config.chance)

    def in_batch(name: str) -> Line:
        return Line("in the batch", steps, smooth([getattr(record, name) for record in session.records], SMOOTHED))

    seen, retrieved = in_batch("loss"), in_batch("accuracy")
    panels = [
        Chart(f"Loss, mean of {SMOOTHED} steps", "step", (seen, loss) if comparable else (seen,)),
        Chart(f"Retrieval, mean of {SMOOTHED} steps", "step", (retrieved, accuracy), chance, 0.0, 1.0),
    ]
    if not comparable:
        panels.insert(1, Chart("Contrastive loss", "step", (loss,)))
    return draw([shown for panel in panels if (shown := panel.without_empty_lines()).lines])


class Samples(Report):
    """One prompt sampled without and with the tokens, same seed, every so many steps; kept as files too."""

    def __init__(self, positive, negative, vae, size: torch.Size, cfg: float, steps: int, every: int, folder: Path):
        self.positive, self.negative, self.vae, self.size = positive, negative, vae, size
        self.cfg, self.steps, self.every, self.folder = cfg, steps, every, folder
        self.without: np.ndarray | None = None

    def after(self, record: StepRecord, session: Session) -> None:
        if record.step % self.every and record.step != session.trainer.config.steps:
            return
        if self.without is None:
            self.without = self._picture(session.model, session.trainer.config.seed)
        tokens = apply_tokens(session.model, session.tokens())
        both = np.concatenate([self.without, self._picture(tokens, session.trainer.config.seed)], axis=1)
        image = Image.fromarray((both * 255).round().astype(np.uint8))
        path = self.folder / f"step_{record.step:06}.png"
        write_atomically(path, lambda temporary: image.save(temporary, "PNG"))
        session.sample = image

    @torch.inference_mode()
    def _picture(self, model, seed: int) -> np.ndarray:
        latent = torch.zeros(1, *self.size)
        noise = comfy.sample.prepare_noise_inner(latent, torch.Generator().manual_seed(seed))
        samples = comfy.sample.sample(
            model, noise, self.steps, self.cfg, positive=self.positive, negative=self.negative, latent_image=latent,
            disable_pbar=True, seed=seed, **SAMPLER,
        )  # fmt: skip
        return decoded_still(self.vae, samples).numpy()
