"""What an engine can do on this machine, found without importing it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Capability:
    """Whether a backend can build and run here, and how to get it.

    Attributes:
        name: name of the backend.
        can_build: whether stages can be compiled here.
        can_run: whether compiled stages can be run here.
        version: version of the installed engine, None when it is not installed.
        reason: why something is not possible, empty when everything is.
        install: the command that installs it.
    """

    name: str
    can_build: bool
    can_run: bool
    version: str | None
    reason: str
    install: str


def installed(module: str) -> bool:
    """Whether a top-level module could be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def version_of(distributions: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed; looked up once a process."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
