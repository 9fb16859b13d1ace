"""Waiting for a lock between processes that the operating system releases when its holder dies."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from softrepa.locks import try_lock


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for as long as another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        waiting = False
        while True:
            try:
                try_lock(file)
                break
            except OSError:
                if not waiting:
                    print(f"Waiting for another process that holds {path}", file=sys.stderr, flush=True)
                waiting = True
                time.sleep(0.2)
        yield  # closing the file releases the lock
