"""The backend `torch_tensorrt`."""

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
from .options import TorchTensorrtOptions

if TYPE_CHECKING:
    from ...ir.program import Stage


@dataclass(frozen=True)
class TorchTensorrt(Backend):
    """See `Backend`."""

    name: ClassVar[str] = "torch_tensorrt"
    suffix: ClassVar[str] = ".engine"
    device: ClassVar[str] = "cuda"
    activations: ClassVar[Activations | None] = None

    options: TorchTensorrtOptions = field(default_factory=TorchTensorrtOptions)

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
        from ..tensorrt.session import open_session

        return open_session(file, inputs, outputs, threads=threads, device=device, options=self.options, files=files)

    def prepared(self, stage: Stage) -> Stage:
        """See `Backend.prepared`."""
        from .lower import prepare

        return prepare(stage, self.options)

    def target(self) -> JsonValue:
        """See `Backend.target`."""
        return dict(capability.target(self.options))
