"""Whether TensorRT can build and run here."""

from __future__ import annotations

from ..capability import Capability, installed
from .cuda import gpus
from .options import TensorrtOptions
from .provider import CAPABILITIES, PROVIDERS, RTX, Provider, provider

NAME = "tensorrt"
COMPILERS = ("torch", "onnx", "onnx_ir", "onnxscript")


def capability() -> Capability:
    """TensorRT-RTX builds on any machine for a named compute capability; everything else needs a GPU that fits."""
    if not any(candidate.is_installed for candidate in PROVIDERS):
        return Capability(NAME, False, False, None, "neither tensorrt_rtx nor tensorrt is installed", RTX.install)
    chosen = provider()
    unable_to_run = _unable_to_run(chosen)
    unable_to_build = _unable_to_build(chosen, unable_to_run)
    reason = "; ".join(filter(None, [unable_to_build, unable_to_run and f"running: {unable_to_run}"]))
    return Capability(NAME, not unable_to_build, not unable_to_run, chosen.version, reason, _install(chosen))


def capability_for(options: TensorrtOptions) -> Capability:
    """As `capability`, for engines built with these options."""
    chosen = provider(options.provider)
    if not chosen.is_installed:
        return Capability(NAME, False, False, None, f"{chosen.name} is not installed", chosen.install)
    unable_to_run = _unable_to_run(chosen, options.capability)
    unable_to_build = _unable_to_build(chosen, unable_to_run)
    if not unable_to_build and options.capability is None and unable_to_run:
        unable_to_build = (
            f"{unable_to_run}; name the compute capability to build for, as in --set tensorrt.capability=SM89 "
            f"({', '.join(CAPABILITIES)})"
        )
    if not unable_to_build and options.capability is not None and not chosen.builds_anywhere:
        unable_to_build = f"{chosen.name} builds for the GPU of this machine only; leave tensorrt.capability out"
    reason = "; ".join(filter(None, [unable_to_build, unable_to_run and f"running: {unable_to_run}"]))
    return Capability(NAME, not unable_to_build, not unable_to_run, chosen.version, reason, _install(chosen))


def _unable_to_build(chosen: Provider, unable_to_run: str) -> str:
    missing = [module for module in COMPILERS if not installed(module)]
    if missing:
        return f"building needs {', '.join(missing)}"
    return "" if chosen.builds_anywhere else unable_to_run


def _unable_to_run(chosen: Provider, wanted: str | None = None) -> str:
    """Why the first GPU of this machine cannot run engines; empty when it can."""
    found, reason = gpus()
    if not found:
        return reason
    gpu = found[0]
    if chosen.capabilities is not None and gpu.capability not in chosen.capabilities:
        return f"{chosen.name} runs on {', '.join(chosen.capabilities)}; the GPU here is {gpu.name}, {gpu.capability}"
    if wanted is not None and wanted != gpu.capability:
        return f"the engine is for {wanted}; the GPU here is {gpu.name}, {gpu.capability}"
    return ""


def _install(chosen: Provider) -> str:
    return f"pip install 'stepfold[compile]' and {chosen.install}"
