"""The numbers of a run while it goes on, for whoever draws them."""

import math
import time
from collections import deque
from collections.abc import Callable

import comfy.model_management as memory

from ...training.trainer import StepRecord
from .reports import SMOOTHED, is_measured
from .session import Report, Session

MOST_POINTS = 600
Point = tuple[int, float | None, float | None]
"""Step, loss, retrieval; None for what is no number, which JSON cannot hold."""


class Live(Report):
    """Sends all that is known of the run, every so many seconds and when it ends."""

    def __init__(self, send: Callable[[dict], None], seconds: float = 1.0):
        self.send, self.seconds, self.sent = send, seconds, -math.inf
        self.curve = Curve()
        self.started: tuple[float, int] | None = None

    def after(self, record: StepRecord, session: Session) -> None:
        now = time.monotonic()
        self.started = self.started or (now, record.step)
        if now - self.sent >= self.seconds:
            self.sent = now
            self.send(self.state(session) | {"ended": False})

    def ended(self, session: Session) -> None:
        self.send(self.state(session) | {"ended": True})

    def state(self, session: Session) -> dict:
        config, done = session.trainer.config, len(session.records)
        self.curve.extend(session.records)
        return {
            "step": done,
            "steps": config.steps,
            "points": self.curve.points(),
            "held_out": [[step, number(loss), number(accuracy)] for step, accuracy, loss in session.held_out],
            "chance": config.chance,
            "comparable": is_measured(config),
            "seconds_left": self.seconds_left(done, config.steps),
            "memory": device_memory(),
        }

    def seconds_left(self, done: int, steps: int) -> float | None:
        """By the steps of this run; None before the second."""
        started, first = self.started or (0.0, done)
        if done == first:
            return None
        return (steps - done) * (time.monotonic() - started) / (done - first)


class Curve:
    """Loss and retrieval as means over the last steps, at no more than MOST_POINTS of them."""

    def __init__(self) -> None:
        self.seen, self.every = 0, 1
        self.recent: deque[StepRecord] = deque(maxlen=SMOOTHED)
        self.kept: list[Point] = []

    def extend(self, records: list[StepRecord]) -> None:
        """With those of `records` that are new."""
        for record in records[self.seen :]:
            self.recent.append(record)
            if record.step % self.every == 0:
                self.kept.append(self.newest())
            if len(self.kept) > MOST_POINTS:
                self.every *= 2
                self.kept = [point for point in self.kept if point[0] % self.every == 0]
        self.seen = len(records)

    def points(self) -> list[Point]:
        """With the newest step, whether it is kept or not."""
        if not self.recent or (self.kept and self.kept[-1][0] == self.recent[-1].step):
            return list(self.kept)  # what was sent is not written to
        return [*self.kept, self.newest()]

    def newest(self) -> Point:
        loss, accuracy = (
            sum(getattr(one, name) for one in self.recent) / len(self.recent) for name in ("loss", "accuracy")
        )
        return self.recent[-1].step, number(loss), number(accuracy)


def number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def device_memory() -> dict:
    """Bytes that are used of the device, by everybody."""
    device = memory.get_torch_device()
    total = memory.get_total_memory(device)
    name = "RAM" if device.type in ("cpu", "mps") else "GPU"
    return {"device": name, "used": total - memory.get_free_memory(device), "total": total}
