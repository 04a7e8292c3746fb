"""The backends of this folder: an engine's functions lie in its own modules, and are imported when they are called."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..loop.held import StageFiles
from ..loop.ports import Port, StageCallable
from .backend import Backend
from .capability import Capability

if TYPE_CHECKING:
    from ..ir.program import Stage


class OwnBackend(Backend):
    """An engine whose folder beside this module has `capability.py`, `lower.py` and `session.py`."""

    def module(self, name: str) -> ModuleType:
        """A module of the engine's folder."""
        return import_module(f"{__package__}.{self.name}.{name}")

    def capability(self) -> Capability:
        """See `Backend.capability`."""
        return self.module("capability").capability()

    def lower(self, stage: Stage, folder: Path) -> Path:
        """See `Backend.lower`."""
        return self.module("lower").lower(stage, folder, options=self.options)

    def session(
        self,
        file: Path,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        *,
        threads: int | None,
        device: str,
        files: StageFiles,
    ) -> StageCallable:
        """See `Backend.session`."""
        open_session = self.module("session").open_session
        return open_session(file, inputs, outputs, threads=threads, device=device, options=self.options, files=files)


class PreparingBackend(OwnBackend):
    """An engine that rounds in its own way: `prepare` in `lower.py` gives a stage as it computes it."""

    def prepared(self, stage: Stage) -> Stage:
        """See `Backend.prepared`."""
        return self.module("lower").prepare(stage, self.options)
