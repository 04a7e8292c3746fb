"""Files that are whole or absent, whatever happens, and a lock that a killed process does not leave behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..loop.errors import StepfoldError, UsageError
from ..loop.writing import FULL_DISK, PARTIAL, temporary_sibling

LOCK = "lock"
BUSY = {errno.EWOULDBLOCK, errno.EACCES}


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file into a temporary sibling that takes its place once it is on disk.

    Raises:
        StepfoldError: the disk is full or the file cannot be written; what was at `path` is still there.
    """
    partial = temporary_sibling(path)
    try:
        with partial.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        what = "room on the disk" if error.errno in FULL_DISK else "a file that can be written"
        raise StepfoldError(
            f"{path}: expected {what}; received: {error.strerror}. Free some space or choose another folder, then run "
            "the same command again: what was finished is kept."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove what a killed process was writing; only its successor, which holds the lock, may do that."""
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder; the system frees it when this process ends, however it ends.

    Args:
        folder: the lock is a file in it, which stays.
        wait: until another process is done, instead of refusing.

    Raises:
        UsageError: another process holds it, or this system has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        raise UsageError("calibrate: expected a system with file locks (flock), such as Linux or macOS.") from None

    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in BUSY:
                raise
            raise UsageError(
                f"{folder}: another process is calibrating into this store. Wait until it is done, or choose another "
                "--out."
            ) from None
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
