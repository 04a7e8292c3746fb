"""Files that take their place in one step, and places that are found unfit before any work is done for them."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import UsageError

LONGEST_KEPT = 80  # bytes of a name that its temporary sibling keeps; both fit the 255 of a file system
PARTIAL = ".partial"
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
FULL_DISK_TEXT = "No space left on device"  # how safetensors and other native libraries report ENOSPC


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it comes from, is that the disk is full."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL_DISK) or FULL_DISK_TEXT in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def temporary_sibling(path: Path) -> Path:
    """A name beside a file or folder that nobody can guess, for what will take its place."""
    kept = os.fsencode(path.name)[:LONGEST_KEPT].decode(errors="ignore")
    return path.with_name(f".{kept}.{secrets.token_hex(8)}{PARTIAL}")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file: what the `with` block writes takes the place of `path` in one step, missing parents are made.

    Whatever goes wrong, an interruption included, leaves what was there, and nothing else.
    """
    partial = temporary_sibling(path)
    made = _missing_parents(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as stream:
            yield stream
        os.replace(partial, path)
        made = []
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        _remove(made)


def require_writable(option: str, path: Path) -> None:
    """Refuse a place that cannot be written, before the work whose result would go there.

    A temporary sibling is made and removed again: only the system knows what it allows.

    Args:
        option: names the place in the message, such as `--out`.
        path: path of the file or folder to write.

    Raises:
        UsageError: a parent is a file or may not be written, the name is too long, or the system has no such place.
        OSError: the disk is full.
    """
    made: list[Path] = []
    partial = temporary_sibling(path)
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # refuses names that are too long, and paths through a file
        made = _missing_parents(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
    except (OSError, ValueError) as problem:
        if isinstance(problem, OSError) and problem.errno in FULL_DISK:
            raise
        raise _unfit(option, path, problem) from None
    finally:
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)
        _remove(made)


def _unfit(option: str, path: Path, problem: OSError | ValueError) -> UsageError:
    reason = (problem.strerror if isinstance(problem, OSError) else None) or str(problem)
    return UsageError(
        f"{option} {path}: expected a place that can be written; received: {reason}. Choose another {option}."
    )


def _missing_parents(path: Path) -> list[Path]:
    """The folders that have to be made for a path, the innermost first."""
    return [parent for parent in path.parents if not parent.exists()]


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
