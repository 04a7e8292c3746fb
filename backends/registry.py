"""The list of backends; an engine's modules are imported when they are used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..loop.errors import UsageError, nearest
from ..loop.ports import Port, StageCallable
from .capability import Capability


@dataclass(frozen=True)
class Backend:
    """An engine by name.

    Attributes:
        name: as in `--backend`, and the folder of its modules.
        suffix: of a compiled stage's file.
    """

    name: str
    suffix: str

    def capability(self) -> Capability:
        """What it can do on this machine."""
        return self.module("capability").capability()

    def open_session(
        self,
        file: Path,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        *,
        threads: int | None = None,
        device: str = "cpu",
    ) -> StageCallable:
        """Open a compiled stage; see `session.py` of the engine.

        Raises:
            UsageError: the engine or the device is missing here.
            BundleError: the file is not what the ports say.
        """
        capability = self.capability()
        if not capability.can_run:
            raise UsageError(
                f"backend {self.name!r} cannot run here: {capability.reason}. Install it: {capability.install}"
            )
        return self.module("session").open_session(file, inputs, outputs, threads=threads, device=device)

    def module(self, name: str) -> ModuleType:
        """`capability`, `session` or `lower` of the engine (the last needs the extra `compile`)."""
        return importlib.import_module(f".{self.name}.{name}", __package__)


BACKENDS = (Backend("onnxruntime", ".onnx"),)


def get(name: str) -> Backend:
    """A backend by name; raises UsageError with the nearest one when there is none."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    names = [backend.name for backend in BACKENDS]
    raise UsageError(f"backend: expected one that this stepfold has; received {name!r}: {nearest(name, names)}")


def backends() -> list[Capability]:
    """What every backend can do here, in the order of registration."""
    return [backend.capability() for backend in BACKENDS]
