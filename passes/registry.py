"""The passes a recipe can name. A new pass is one file and one line here."""

from __future__ import annotations

from typing import Any

from ..loop.errors import UsageError, nearest
from .base import Pass
from .fuse.onnxruntime import FuseOnnxRuntime
from .quantize.quantize import Quantize
from .schedule.hoist import Hoist
from .schedule.schedule import SearchSchedule

PASSES: tuple[type[Pass[Any]], ...] = (Hoist, Quantize, FuseOnnxRuntime, SearchSchedule)


def pass_named(name: str) -> type[Pass[Any]]:
    """The pass a recipe names.

    Raises:
        UsageError: there is none of that name.
    """
    for candidate in PASSES:
        if candidate.name == name:
            return candidate
    raise UsageError(f"unknown pass {name!r}; {nearest(name, [candidate.name for candidate in PASSES])}")
