"""The backend `openvino`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..backend import Activations
from ..own import PreparingBackend
from ..shared import Shared
from .options import OpenvinoOptions

if TYPE_CHECKING:
    from ...ir.program import Stage


@dataclass(frozen=True)
class Openvino(PreparingBackend):
    """See `Backend`."""

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    activations: ClassVar[Activations | None] = "symmetric"
    exact_form: ClassVar[str | None] = "two layers whose codes add up"

    options: OpenvinoOptions = field(default_factory=OpenvinoOptions)

    def float_without_vnni(self, stage: Stage) -> bool:
        """See `Backend.float_without_vnni`."""
        return self.module("lower").float_without_vnni(stage, self.options)

    def share(self, files: Sequence[Path]) -> Shared | None:
        """See `Backend.share`."""
        from .share import share

        return share(files)
