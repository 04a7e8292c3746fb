"""The backend `torch_tensorrt`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import JsonValue

from ..backend import Activations
from ..own import PreparingBackend
from .options import TorchTensorrtOptions


@dataclass(frozen=True)
class TorchTensorrt(PreparingBackend):
    """See `Backend`."""

    name: ClassVar[str] = "torch_tensorrt"
    suffix: ClassVar[str] = ".engine"
    device: ClassVar[str] = "cuda"
    activations: ClassVar[Activations | None] = None

    options: TorchTensorrtOptions = field(default_factory=TorchTensorrtOptions)

    def target(self) -> JsonValue:
        """See `Backend.target`."""
        return dict(self.module("capability").target(self.options))
