"""Options of the Torch-TensorRT backend."""

from __future__ import annotations

from ..tensorrt.options import PlanOptions


class TorchTensorrtOptions(PlanOptions):
    """Options of the engine: those of a plan; it is built by classic TensorRT for the GPU of this machine."""
