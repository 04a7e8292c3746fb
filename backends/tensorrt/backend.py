"""The backend `tensorrt`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import JsonValue

from ...loop.held import StageFiles
from ...loop.ports import Port, StageCallable
from ..backend import Activations, Backend
from ..capability import Capability
from . import capability
from .options import TensorrtOptions

if TYPE_CHECKING:
    from ...ir.program import Stage


@dataclass(frozen=True)
class Tensorrt(Backend):
    """See `Backend`."""

    name: ClassVar[str] = "tensorrt"
    suffix: ClassVar[str] = ".engine"
    device: ClassVar[str] = "cuda"
    activations: ClassVar[Activations | None] = "symmetric"

    options: TensorrtOptions = field(default_factory=TensorrtOptions)

    def capability(self) -> Capability:
        """See `Backend.capability`."""
        return capability.capability()

    def lower(self, stage: Stage, folder: Path) -> Path:
        """See `Backend.lower`."""
        from .lower import lower

        return lower(stage, folder, options=self.options)

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
        from .session import open_session

        return open_session(file, inputs, outputs, threads=threads, device=device, options=self.options, files=files)

    def capability_here(self) -> Capability:
        """See `Backend.capability_here`."""
        return capability.capability_for(self.options)

    def prepared(self, stage: Stage) -> Stage:
        """See `Backend.prepared`."""
        from .lower import prepare

        return prepare(stage, self.options)

    def target(self) -> JsonValue:
        """See `Backend.target`."""
        return dict(capability.target(self.options))
