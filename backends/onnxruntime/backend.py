"""The backend `onnxruntime`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...loop.held import StageFiles
from ...loop.ports import Port, StageCallable
from ..backend import Backend
from ..capability import Capability
from ..shared import Shared
from . import capability
from .options import OnnxruntimeOptions

if TYPE_CHECKING:
    from ...ir.program import Stage


@dataclass(frozen=True)
class Onnxruntime(Backend):
    """See `Backend`."""

    name: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"
    exact_form: ClassVar[str | None] = "unsigned weights"

    options: OnnxruntimeOptions = field(default_factory=OnnxruntimeOptions)

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

    def share(self, files: Sequence[Path]) -> Shared | None:
        """See `Backend.share`."""
        from ..onnx.share import share

        return share(files)
