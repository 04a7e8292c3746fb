"""Whether Torch-TensorRT can build, and TensorRT run, here."""

from __future__ import annotations

from ..capability import Capability, installed, version_of
from ..tensorrt.cuda import gpus
from ..tensorrt.provider import CLASSIC
from .options import TorchTensorrtOptions

NAME = "torch_tensorrt"
INSTALL = "pip install torch-tensorrt beside a PyTorch with CUDA"


def capability() -> Capability:
    """Both need a GPU; running needs classic TensorRT only, building Torch-TensorRT and a PyTorch with CUDA."""
    version = version_of(("torch-tensorrt",))
    found, reason = gpus()
    if not found:
        return Capability(NAME, False, False, version, reason, INSTALL)
    if not CLASSIC.is_installed:
        return Capability(NAME, False, False, version, "tensorrt is not installed", INSTALL)
    missing = [module for module in ("torch", NAME) if not installed(module)]
    reason = f"building needs {', '.join(missing)}" if missing else ""
    return Capability(NAME, not missing, True, version or CLASSIC.version, reason, INSTALL)


def target(options: TorchTensorrtOptions) -> dict[str, str | None]:
    """What plans built here are for: the version of TensorRT that runs them, and the GPU."""
    found, _ = gpus()
    return {"tensorrt": CLASSIC.version, "gpu": f"{found[0].name} {found[0].capability}" if found else None}
