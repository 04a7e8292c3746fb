"""Whether ONNX Runtime can build and run here."""

from __future__ import annotations

from dataclasses import replace

from ..capability import Capability, installed, version_of
from ..tensorrt import cuda as driver
from .options import OnnxruntimeOptions

NAME = "onnxruntime"
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml")
GPU_PACKAGE = "pip uninstall onnxruntime && pip install onnxruntime-gpu"
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


def capability_for(options: OnnxruntimeOptions) -> Capability:
    """As `capability`, for the provider of these options; a GPU's is asked for by loading the engine."""
    found = capability()
    if options.provider == "cpu" or not found.can_run:
        return found
    reason = _unable_to_run(options)
    if not reason:
        return found
    told = "; ".join(filter(None, [found.reason, f"running: {reason}"]))
    return replace(found, can_run=False, reason=told, install=GPU_PACKAGE)


def _unable_to_run(options: OnnxruntimeOptions) -> str:
    """Why the provider cannot run here; empty when it can."""
    import onnxruntime

    from .session import PROVIDERS

    name, available = PROVIDERS[options.provider][0], onnxruntime.get_available_providers()
    if name not in available:
        return f"the installed onnxruntime has no {name}, only {', '.join(available)}"
    gpus, reason = driver.gpus()
    return "" if gpus else reason
