"""The backend `onnxruntime`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ..capability import Capability
from ..own import OwnBackend
from ..shared import Shared
from .options import OnnxruntimeOptions


@dataclass(frozen=True)
class Onnxruntime(OwnBackend):
    """See `Backend`."""

    name: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"
    exact_form: ClassVar[str | None] = "unsigned weights"

    options: OnnxruntimeOptions = field(default_factory=OnnxruntimeOptions)

    def capability_here(self) -> Capability:
        """See `Backend.capability_here`."""
        return self.module("capability").capability_for(self.options)

    def share(self, files: Sequence[Path]) -> Shared | None:
        """See `Backend.share`."""
        from ..onnx.share import share

        return share(files)
