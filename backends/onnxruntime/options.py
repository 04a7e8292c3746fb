"""Options of the ONNX Runtime backend."""

from __future__ import annotations

from typing import Literal

from ...loop.options import Options

Provider = Literal["cpu", "cuda", "tensorrt"]


class OnnxruntimeOptions(Options):
    """Options of the engine.

    Attributes:
        provider: what runs the stages: `cuda` and `tensorrt` need onnxruntime-gpu and an NVIDIA GPU; the files are the
            same for all.
    """

    provider: Provider = "cpu"

    @property
    def device(self) -> str:
        """The device that the provider runs on."""
        return "cpu" if self.provider == "cpu" else "cuda"
