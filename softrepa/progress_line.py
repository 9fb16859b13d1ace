"""The progress of a run in a terminal."""

import sys

from .errors import printable


class ProgressLine:
    """The last line of a message, on one line of a terminal; what is above it once, on lines of its own."""

    def __init__(self):
        self.told: set[str] = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if sys.stderr.isatty():
            print(file=sys.stderr)

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
