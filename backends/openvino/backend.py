"""The backend `openvino`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...loop.held import StageFiles
from ...loop.ports import Port, StageCallable
from ..backend import Activations, Backend
from ..capability import Capability
from ..shared import Shared
from . import capability
from .options import OpenvinoOptions

if TYPE_CHECKING:
    from ...ir.program import Stage


@dataclass(frozen=True)
class Openvino(Backend):
    """See `Backend`."""

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    activations: ClassVar[Activations | None] = "symmetric"
    exact_form: ClassVar[str | None] = "two layers whose codes add up"

    options: OpenvinoOptions = field(default_factory=OpenvinoOptions)

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

    def prepared(self, stage: Stage) -> Stage:
        """See `Backend.prepared`."""
        from .lower import prepare

        return prepare(stage, self.options)

    def float_without_vnni(self, stage: Stage) -> bool:
        """See `Backend.float_without_vnni`."""
        from .lower import float_without_vnni

        return float_without_vnni(stage, self.options)

    def share(self, files: Sequence[Path]) -> Shared | None:
        """See `Backend.share`."""
        from .share import share

        return share(files)
