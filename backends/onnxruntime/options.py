"""Options of the ONNX Runtime backend."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...loop.options import Options

Provider = Literal["cpu", "cuda", "tensorrt"]


class OnnxruntimeOptions(Options):
    """Options of the engine.

    Attributes:
        provider: what runs the stages: `cuda` and `tensorrt` need onnxruntime-gpu and an NVIDIA GPU; the files are the
            same for all.
        rows: fewest rows per core; a batch with at least that many rows for every core of the CPU is split, and the
            parts run in parallel. None runs every batch whole, with all cores in one operator after the other.
    """

    provider: Provider = "cpu"
    rows: int | None = Field(default=5, ge=1, le=1 << 20)

    @property
    def device(self) -> str:
        """The device that the provider runs on."""
        return "cpu" if self.provider == "cpu" else "cuda"
