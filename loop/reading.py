"""Guarded reading of files that somebody else wrote: what is no regular file, too large, too deep or damaged is refused.

Each format has one reader (JSON here, YAML in `yaml_files`, arrays in `array_files`), and whatever is read goes through
it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import IO, Any

from .errors import StepfoldError, UsageError
from .held import HeldFile, Source

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the file begins that Git leaves where a large one was not fetched."""
LARGEST_TEXT_BYTES = 64 << 20
DEEPEST = 64  # levels of lists and mappings; what people and libraries write has fewer than ten
LONGEST_NUMBER = 400  # digits; a float has at most 309 before its point

_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


@dataclass(frozen=True)
class Expected:
    """What a file should be, and how another one is refused.

    Attributes:
        what: kind of file, for the message: `a loop file`.
        error: class to raise: `UsageError` for what a user gave, `BundleError` or `StepfoldError` for what stepfold
            wrote.
        hint: next step, a sentence.
    """

    what: str
    error: type[StepfoldError] = UsageError
    hint: str = ""

    def refusal(self, subject: object, received: str) -> StepfoldError:
        """The error about a file: its path, what was expected and what was received."""
        return self.error(f"{subject}: expected {self.what}; {received}. {self.hint}".rstrip())


@contextmanager
def opened(path: Source, expected: Expected) -> Iterator[IO[bytes]]:
    """Open a regular file for reading; pipes, devices, sockets and folders are refused without waiting for them.

    A file that is held open is read from its beginning.

    Raises:
        StepfoldError: there is no such file, it is no regular one, or the system refuses to open or to read it.
    """
    if isinstance(path, HeldFile):
        yield path.stream
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as problem:
        raise expected.refusal(path, _reason(problem)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for test, name in _KINDS.items() if test(mode)), "no file")
        raise expected.refusal(path, f"received {kind}")
    with os.fdopen(descriptor, "rb") as stream:
        try:
            if stream.peek(len(LFS_POINTER))[: len(LFS_POINTER)] == LFS_POINTER:
                raise expected.refusal(path, "received a Git LFS pointer in its place. Fetch the files: git lfs pull")
            yield stream
        except OSError as problem:
            if problem.errno == errno.ENOSPC:
                raise  # of something that the block writes
            raise expected.refusal(path, _reason(problem)) from None


def _reason(problem: OSError | ValueError) -> str:
    if isinstance(problem, FileNotFoundError):
        return "there is no such file"
    return f"received: {(problem.strerror if isinstance(problem, OSError) else None) or problem}"


def read_bytes(path: Source, expected: Expected, most: int = LARGEST_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes; raises as `opened` does."""
    with opened(path, expected) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise expected.refusal(path, f"it is larger than the {most:,} bytes that one may have")
    return content


def read_text(path: Source, expected: Expected, most: int = LARGEST_TEXT_BYTES) -> str:
    """The UTF-8 text of a regular file; raises as `opened` does."""
    try:
        return read_bytes(path, expected, most).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise expected.refusal(path, f"received bytes that are no UTF-8 text: {problem}") from None


def read_json(path: Source, expected: Expected, most: int = LARGEST_TEXT_BYTES, *, strict: bool = True) -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        expected: what it should be.
        most: largest size in bytes.
        strict: whether NaN, infinity and a key that stands twice are refused; other libraries write and take them.

    Raises:
        StepfoldError: see `opened`; or the file is not JSON, is nested too deeply, or holds a number that is too long.
    """
    return parse_json(read_text(path, expected, most), path, expected, strict=strict)


def parse_json(text: str | bytes, subject: object, expected: Expected, *, strict: bool = True) -> Any:
    """The value of a JSON text; `subject` is what the message begins with, see `read_json`."""
    try:
        value = json.loads(
            text,
            parse_constant=_no_constant if strict else float,
            parse_float=_finite_float if strict else float,
            parse_int=_short_int,
            object_pairs_hook=_unique if strict else None,
        )
        _refuse_depth(value)
    except RecursionError:
        raise expected.refusal(subject, f"received JSON of more than {DEEPEST} levels") from None
    except ValueError as problem:  # also JSONDecodeError and UnicodeDecodeError
        raise expected.refusal(subject, f"received no usable JSON: {problem}") from None
    return value


def _refuse_depth(value: Any) -> None:
    """Raise ValueError when lists and mappings are nested more than `DEEPEST` levels; asks no stack for it."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [item for parent in level for item in _items(parent)]
        if not level:
            return
    raise ValueError(f"more than {DEEPEST} levels of lists and mappings")


def _items(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, (dict, list))]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r:.80} twice")
        found[name] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"the number {text}")


def _finite_float(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"the number {text:.20}, which no float holds")
    return value


def _short_int(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
