"""A lock on a file that the operating system lets go when its holder dies. Standard library only."""

import contextlib
import os
import sys
from collections.abc import Iterator
from io import BufferedRandom
from pathlib import Path

IS_WINDOWS = sys.platform == "win32"
REFUSED = PermissionError if IS_WINDOWS else BlockingIOError
"""What a lock that somebody else has looks like."""

if sys.platform == "win32":
    import msvcrt

    def try_lock(file: BufferedRandom) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def try_lock(file: BufferedRandom) -> None:
        """Raises OSError, at once, where it cannot be had."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class HeldError(Exception):
    """Another process, or another part of this one, holds the lock."""


class NoLocksError(Exception):
    """The file system knows no locks: some network folders."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock `path`, a file that is there only while it is held, or that a killed holder has left.

    Raises HeldError or NoLocksError at once, and what opening a file raises.
    """
    with _locked(path):
        try:
            yield
        finally:
            if not IS_WINDOWS:  # while nobody else can have it
                _delete(path)
    if IS_WINDOWS:  # which deletes no open file, ours or another's
        _delete(path)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):  # an empty file that stays does not matter
        path.unlink()


def _locked(path: Path) -> BufferedRandom:
    """The open file. Who had it before may have deleted it meanwhile: a lock on that would keep nobody away."""
    while True:
        file = path.open("a+b")
        try:
            _lock(file)
            if IS_WINDOWS or _is_at(path, file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_at(path: Path, file: BufferedRandom) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: BufferedRandom) -> None:
    try:
        try_lock(file)
    except REFUSED:
        raise HeldError from None
    except OSError as error:
        raise NoLocksError(str(error)) from None
