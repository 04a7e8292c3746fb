"""Whether OpenVINO can build and run here."""

from __future__ import annotations

from ..capability import Capability, installed, version_of

NAME = "openvino"
COMPILERS = ("torch", "onnx", "onnx_ir", "onnxscript")


def capability() -> Capability:
    """Running needs the engine; building needs PyTorch and the ONNX exporter too."""
    if not installed(NAME):
        return Capability(NAME, False, False, None, "openvino is not installed", "pip install 'stepfold[openvino]'")
    missing = [module for module in COMPILERS if not installed(module)]
    reason = f"building needs {', '.join(missing)}" if missing else ""
    install = "pip install 'stepfold[compile,openvino]'"
    return Capability(NAME, not missing, True, version_of((NAME,)), reason, install)
