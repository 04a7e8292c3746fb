"""The two packages with one interface: TensorRT-RTX and classic TensorRT."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, get_args

from ...loop.errors import UsageError
from ..capability import installed, version_of
from .options import ComputeCapability

CAPABILITIES: tuple[str, ...] = get_args(ComputeCapability)


@dataclass(frozen=True)
class Provider:
    """A package that builds and runs engines.

    Attributes:
        name: name of its module.
        distributions: names its version may be found under.
        install: the command that installs it.
        builds_anywhere: whether it builds for a named compute capability on a machine without a GPU.
        keeps_timings: whether its timing cache holds anything.
        capabilities: compute capabilities of the GPUs it works on; None for all that its installer supports.
    """

    name: str
    distributions: tuple[str, ...]
    install: str
    builds_anywhere: bool
    keeps_timings: bool
    capabilities: tuple[str, ...] | None

    @property
    def is_installed(self) -> bool:
        """Whether its module could be imported; it is not."""
        return installed(self.name)

    @property
    def version(self) -> str | None:
        """The installed version."""
        return version_of(self.distributions) if self.is_installed else None

    def load(self) -> ModuleType:
        """Its module.

        Raises:
            UsageError: it is not installed, or its libraries cannot be loaded.
        """
        try:
            return importlib.import_module(self.name)
        except (ImportError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"{self.name} cannot be used here: {reason}. Install it: {self.install}") from error


RTX = Provider(
    "tensorrt_rtx", ("tensorrt_rtx", "tensorrt_rtx_cu13"), "pip install 'stepfold[tensorrt]'", True, False, CAPABILITIES
)
CLASSIC = Provider(
    "tensorrt", ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"), "pip install tensorrt", False, True, None
)
PROVIDERS = (RTX, CLASSIC)


def provider(name: str = "auto") -> Provider:
    """A provider by name; `auto` is the first that is installed, TensorRT-RTX where none is."""
    if name == "auto":
        return next((candidate for candidate in PROVIDERS if candidate.is_installed), RTX)
    return next(candidate for candidate in PROVIDERS if candidate.name == name)


@dataclass(frozen=True)
class Message:
    """One line of TensorRT's log."""

    severity: str
    text: str

    def __str__(self) -> str:
        return f"[{self.severity}] {self.text}"


@contextmanager
def collected(tensorrt: ModuleType) -> Iterator[list[Message]]:
    """What TensorRT logs inside the block, without its verbose lines."""
    log = logger(tensorrt)
    before, log.messages = log.messages, []
    try:
        yield log.messages
    finally:
        log.messages = before


@functools.cache
def logger(tensorrt: ModuleType) -> Any:
    """The logger of a provider: one for the process, as TensorRT keeps a pointer to the first it gets."""

    class Log(tensorrt.ILogger):
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.messages: list[Message] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity != tensorrt.ILogger.Severity.VERBOSE:
                self.messages.append(Message(severity.name, msg))

    return Log()
