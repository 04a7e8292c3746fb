"""Whether ONNX Runtime can build and run here."""

from __future__ import annotations

from ..capability import Capability, installed, version_of

NAME = "onnxruntime"
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml")
COMPILERS = ("torch", "onnx", "onnx_ir", "onnxscript")


def capability() -> Capability:
    """Running needs the engine, which is in the core install; building needs PyTorch and the ONNX exporter too."""
    can_run = installed(NAME)
    missing = [module for module in COMPILERS if not installed(module)]
    version = version_of(DISTRIBUTIONS) if can_run else None
    if not can_run:
        return Capability(NAME, False, False, version, "onnxruntime is not installed", "pip install onnxruntime")
    if missing:
        reason = f"building needs {', '.join(missing)}"
        return Capability(NAME, False, True, version, reason, "pip install 'stepfold[compile]'")
    return Capability(NAME, True, True, version, "", "pip install 'stepfold[compile]'")
