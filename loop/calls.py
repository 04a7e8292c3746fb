"""Arguments of the public functions: each is of its kind, or the error names it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .errors import UsageError

T = TypeVar("T")


def _refusal(name: str, expected: str, value: Any) -> UsageError:
    return UsageError(f"{name}: expected {expected}; received {type(value).__name__} {value!r:.60}.")


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of Python or NumPy, `least` or more; raises UsageError for anything else."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < least:
        raise _refusal(name, f"a whole number, {least} or more", value)
    return int(value)


def wholes(name: str, value: Any) -> list[int]:
    """Whole numbers of a list, a tuple, an array or a tensor; raises UsageError for anything else."""
    given = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise _refusal(name, "a list of whole numbers", value)
    return [whole(f"{name}[{i}]", entry, -(1 << 63)) for i, entry in enumerate(given)]


def text(name: str, value: Any) -> str:
    """A text; raises UsageError for anything else."""
    if not isinstance(value, str):
        raise _refusal(name, "a text", value)
    return value


def texts(name: str, value: Any) -> list[str]:
    """One text or several, of a list, a tuple or an array; raises UsageError for anything else."""
    given = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise _refusal(name, "a text or a list of texts", value)
    return [text(f"{name}[{i}]", entry) for i, entry in enumerate(given)]


def named(name: str, value: Any) -> dict[str, Any]:
    """A mapping from names; raises UsageError for anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _refusal(name, "a mapping from names to values", value)
    return dict(value)


def place(name: str, value: Any) -> Path:
    """A path of a text or a path; raises UsageError for anything else."""
    if not isinstance(value, (str, os.PathLike)) or "\0" in str(value):
        raise _refusal(name, "a path", value)
    return Path(value)


def function(name: str, value: Any) -> Callable[..., Any]:
    """Something that can be called; raises UsageError for anything else."""
    if not callable(value):
        raise _refusal(name, "a function", value)
    return value


def instance(name: str, value: Any, kind: type[T], what: str) -> T:
    """An object of a class, which `what` names; raises UsageError for anything else."""
    if not isinstance(value, kind):
        raise _refusal(name, what, value)
    return value
