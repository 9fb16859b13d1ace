"""The progress of a run in a terminal."""

import sys
import time

from .errors import printable

BAR = 20
"""Characters of a bar."""


class ProgressLine:
    """The last line of a message, on one line of a terminal; what is above it once, on lines of its own."""

    def __init__(self):
        self.told: set[str] = set()
        self.began: dict[tuple[str, int], float] = {}
        self.said = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if sys.stderr.isatty():
            print(file=sys.stderr)

    def counted(self, what: str, done: int, total: int) -> None:
        """How far something has come, at most once a second, and how long the rest takes at its speed."""
        now = time.monotonic()
        if (what, total) not in self.began:
            self.began[what, total], self.said = now, 0.0
        if now - self.said < 1 and done < total:
            return
        self.said = now
        left = int((now - self.began[what, total]) * (total - done) / done) if done else 0
        filled = BAR * done // max(total, 1)
        bar = f"[{'#' * filled}{'.' * (BAR - filled)}] " if sys.stderr.isatty() else ""
        rest = f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left" if done else ""
        self(f"{what} {bar}{done}/{total}{rest}")

    def __call__(self, text: str) -> None:
        *notices, progress = printable(text).split("\n")
        start = "\r\x1b[2K" if sys.stderr.isatty() else ""
        for notice in notices:
            if notice not in self.told:
                self.told.add(notice)
                print(f"{start}{notice}", file=sys.stderr)
        print(f"{start}{progress}", end="" if start else "\n", file=sys.stderr, flush=True)


def time_left(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
