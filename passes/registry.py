"""The passes a recipe can name. A new pass is one file and one line here; other packages declare theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..loop.errors import UsageError, nearest
from ..loop.extensions import Extensions
from .attend.sparsify import SparsifyAttention
from .base import Pass
from .cut.cut import Cut
from .fuse.fuse import Fuse
from .hoist.hoist import Hoist
from .prune.prune import Prune
from .quantize.quantize import Quantize
from .schedule.schedule import SearchSchedule

PASSES: tuple[type[Pass[Any]], ...] = (
    Hoist,
    Prune,
    Cut,
    SparsifyAttention,
    Quantize,
    Fuse,
    SearchSchedule,
)

OTHERS: Extensions[type[Pass[Any]]] = Extensions(
    "stepfold.passes", "pass", lambda found: isinstance(found, type) and issubclass(found, Pass)
)
"""Passes of other packages: entry points of the group `stepfold.passes`, each a subclass of `Pass`."""


def all_passes() -> Sequence[type[Pass[Any]]]:
    """The passes of stepfold, then those of other packages."""
    return *PASSES, *OTHERS.load_all(_own())


def names() -> list[str]:
    """The names of all passes; nothing is imported for those of other packages."""
    return [*_own(), *OTHERS.names()]


def pass_named(name: str) -> type[Pass[Any]]:
    """The pass a recipe names.

    Raises:
        UsageError: there is none of that name, or the package that declares it is broken.
    """
    for candidate in PASSES:
        if candidate.name == name:
            return candidate
    if name not in OTHERS.names():
        raise UsageError(f"unknown pass {name!r}; {nearest(name, names())}")
    return OTHERS.load(name)


def _own() -> list[str]:
    return [candidate.name for candidate in PASSES]
