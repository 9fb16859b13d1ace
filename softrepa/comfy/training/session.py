"""The steps of one training run, who looks at them, and what the run leaves on disk."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import comfy.model_management as memory
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from PIL import Image

from ... import token_files
from ...data.dataset import Dataset
from ...errors import SoftREPAError, said, shown
from ...tokens import SoftTokens
from ...training import state as training_state
from ...training.trainer import DivergedError, StepRecord, Trainer
from .. import folders
from .memory_use import AdaptivePairs


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes its tokens and its state, and after how many steps; 0 is only at the end.

    `is_new` where nothing is there yet. `claim` keeps others from writing them and gives a line where that is not
    possible.
    """

    tokens: Path
    state: Path
    is_new: bool = True
    every: int = 500
    claim: Callable[[], str] = lambda: ""


ELSEWHERE = RunFiles(Path("tokens.safetensors"), Path(), every=0)
"""Of a process that computes for a run which another one writes."""


@dataclass(frozen=True)
class Parts:
    """What a run is made of, loaded and checked.

    identity: the settings that decide its result, by name; metadata: what the token file says of it.
    """

    trainer: Trainer
    pairs: AdaptivePairs
    dataset: Dataset
    model: ModelPatcher
    identity: dict[str, object]
    metadata: dict[str, str]


class Report:
    """Somebody who looks at a run after each step, and once when it ends, however it does."""

    is_shared = False
    """Whether the processes of a run do it together: then one that fails there has to stop."""

    def after(self, record: StepRecord, session: "Session") -> None: ...

    def ended(self, session: "Session") -> None: ...


class Session:
    """The steps of one run and what it leaves on disk. Raises SoftREPAError where another run writes there."""

    def __init__(self, parts: Parts, files: RunFiles, say: Callable[[str], None]):
        self.parts, self.files, self._say = parts, files, say
        self.trainer, self.dataset, self.model = parts.trainer, parts.dataset, parts.model
        problem = files.claim()
        self.notices: dict[str, str] = {"lock": problem} if problem else {}
        """What stays readable above the progress, by subject."""
        self.progress = ""
        self.sample: Image.Image | None = None
        """The newest preview of a prompt, where somebody draws one."""
        self.records: list[StepRecord] = []
        self.held_out: list[tuple[int, float, float]] = []
        """(step, retrieval accuracy, loss) on images that are not trained on, where somebody measured them."""
        self.position = self.dataset.state()
        self.written = (0, 0)
        self.has_diverged = False
        self.bar = ProgressBar(self.trainer.config.steps)

    def go_on_from(self, saved: training_state.TrainingState) -> None:
        saved = training_state.load(self.files.state)  # whoever wrote it until now may have gone on
        if saved.step > self.trainer.config.steps:
            raise SoftREPAError(
                f"steps is {self.trainer.config.steps}, expected at least the {saved.step} that "
                f"{self.files.state.name} has behind it, or resume off."
            )
        training_state.restore(self.trainer, saved)
        self.dataset.restore(saved.position)
        self.records, self.held_out, self.position = list(saved.records), list(saved.held_out), saved.position
        self.written = self._measure()

    def join(self) -> None:
        """Where the first process of the run stands, all of them do."""
        known = {
            "records": [astuple(record) for record in self.records],
            "held_out": self.held_out,
            "position": self.position,
        }
        known = self.trainer.ranks.told(known)
        self.records = [StepRecord(*record) for record in known["records"]]
        self.held_out = [tuple(measured) for measured in known["held_out"]]
        self.position = known["position"]
        self.dataset.restore(self.position)
        self.trainer.step_index = len(self.records)

    def notice(self, subject: str, text: str) -> None:
        """A line that stays until there is a newer one of its subject."""
        self.notices[subject] = text
        self.say(self.progress)

    def say(self, progress: str) -> None:
        self.progress = progress
        self._say("\n".join([progress, *self.notices.values()]).strip())

    def show(self, image: Image.Image) -> None:
        """A picture in the node."""
        self.bar.update_absolute(len(self.records), preview=("JPEG", image, None))

    def run(self, micro_batch: int, reports: Sequence[Report]) -> None:
        steps, first = self.trainer.config.steps, len(self.records)
        started, said = time.monotonic(), 0.0
        while len(self.records) < steps:
            memory.throw_exception_if_processing_interrupted()
            try:
                record = self.trainer.step(micro_batch)
            except DivergedError:
                self.has_diverged = True
                raise
            self.records.append(record)
            self.position = self.dataset.state()
            self.bar.update_absolute(record.step)
            now = time.monotonic()
            if now - said >= 1 or record.step == steps:
                said = now
                self.say(progress_line(self.records, steps, len(self.records) - first, now - started))
            is_due = self.files.every and record.step % self.files.every == 0
            if is_due:  # before the reports, which may take minutes
                self._try(self.write, "saved")
            for report in reports:
                self._look(report, record)
            if is_due:  # with what they measured
                self._try(self.write, "saved")

    def _look(self, report: Report, record: StepRecord) -> None:
        look = partial(report.after, record, self)
        if report.is_shared and self.trainer.ranks.count > 1:
            look()  # the others wait within it
        else:
            self._try(look, f"reported by {type(report).__name__}")

    def _try(self, action: Callable[[], None], done: str) -> None:
        """A run of hours can outlive a full disk, a log that another program holds, a preview without memory."""
        try:
            action()
        except memory.InterruptProcessingException:
            raise
        except Exception as error:
            text = f"step {len(self.records)} could not be {done} ({shown(error)}); training goes on"
            logging.warning("SoftREPA: %s", text)
            self.notice("trouble", text)

    def tokens(self) -> SoftTokens:
        """As they are after the last finished step."""
        metadata = self.parts.metadata | {"steps": str(len(self.records))}
        return self.trainer.finished(folders.listed_name(self.files.tokens), metadata)

    def finish(self, reports: Sequence[Report]) -> None:
        """Write what is not written yet, and say where an unfinished run is. Raises SoftREPAError where that fails.

        A run whose loss or gradient became NaN or infinite leaves what was saved before as it is.
        """
        try:
            if not self.has_diverged:
                self.write()
            elif not self.written[0]:
                self._try(self.write, "saved")
        except OSError as error:
            raise SoftREPAError(
                f"{shown(self.files.tokens)} could not be written ({said(error)}), expected a folder with room; "
                f"saved until now: step {self.written[0]} of {len(self.records)}."
            ) from error
        finally:
            for report in reports:
                self._try(partial(report.ended, self), f"reported by {type(report).__name__}")
        if not self.records:
            self.say("stopped before the first step: nothing to save")
        elif len(self.records) < self.trainer.config.steps:
            self.say(f"stopped after step {self.written[0]}, saved as {self.files.tokens.name}")

    def write(self) -> None:
        """The state first: what is in the token file can always be gone on from."""
        if self.files is ELSEWHERE:
            return
        if self._measure() == self.written and (self.files.tokens.exists() or not self.records):
            return
        tokens = self.tokens()  # refuses what is not finite, before a good state is replaced
        state = training_state.capture(self.trainer, self.records, self.held_out, self.position, self.parts.identity)
        training_state.save(state, self.files.state)
        token_files.save(tokens, self.files.tokens)
        self.written = self._measure()

    def _measure(self) -> tuple[int, int]:
        """How much there is to write."""
        return len(self.records), len(self.held_out)


def progress_line(records: list[StepRecord], steps: int, done: int, seconds: float) -> str:
    """Step, loss and in-batch retrieval over the last steps; speed and time left by the `done` steps of this run."""
    recent = records[-50:]
    loss = sum(record.loss for record in recent) / len(recent)
    accuracy = sum(record.accuracy for record in recent) / len(recent)
    rate = done / max(seconds, 1e-9)
    left = int((steps - len(records)) / rate)
    retrieval = "" if math.isnan(accuracy) else f"retrieval {accuracy:.0%}, "
    return (
        f"step {len(records)}/{steps}, loss {loss:.4f}, {retrieval}{rate:.2f} steps/s, "
        f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )
