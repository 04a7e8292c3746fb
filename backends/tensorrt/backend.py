"""The backend `tensorrt`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import JsonValue

from ..backend import Activations
from ..capability import Capability
from ..own import PreparingBackend
from .options import TensorrtOptions


@dataclass(frozen=True)
class Tensorrt(PreparingBackend):
    """See `Backend`."""

    name: ClassVar[str] = "tensorrt"
    suffix: ClassVar[str] = ".engine"
    device: ClassVar[str] = "cuda"
    activations: ClassVar[Activations | None] = "symmetric"

    options: TensorrtOptions = field(default_factory=TensorrtOptions)

    def capability_here(self) -> Capability:
        """See `Backend.capability_here`."""
        return self.module("capability").capability_for(self.options)

    def target(self) -> JsonValue:
        """See `Backend.target`."""
        return dict(self.module("capability").target(self.options))
