"""Whether TensorRT can build and run here."""

from __future__ import annotations

from ..capability import Capability, installed
from .cuda import gpus
from .options import TensorrtOptions
from .provider import CAPABILITIES, Provider, provider

NAME = "tensorrt"
COMPILERS = ("torch", "onnx", "onnx_ir", "onnxscript")


def capability() -> Capability:
    """TensorRT-RTX builds on any machine for a named compute capability; everything else needs a GPU that fits."""
    return _assess(provider(), None, named=True)


def capability_for(options: TensorrtOptions) -> Capability:
    """As `capability`, for engines built with these options."""
    return _assess(provider(options.provider), options.capability, named=options.capability is not None)


def _assess(chosen: Provider, wanted: str | None, *, named: bool) -> Capability:
    """What a provider can do for a compute capability; None is any where one is or will be named, else the GPU here."""
    if not chosen.is_installed:
        return Capability(NAME, False, False, None, f"{chosen.name} is not installed", chosen.install)
    running = _unable_to_run(chosen, wanted)
    building = _unable_to_build(chosen, running, wanted, named)
    reason = "; ".join(filter(None, [building, f"running: {running}" if running else ""]))
    return Capability(NAME, not building, not running, chosen.version, reason, _install(chosen))


def _unable_to_build(chosen: Provider, running: str, wanted: str | None, named: bool) -> str:
    missing = [module for module in COMPILERS if not installed(module)]
    if missing:
        return f"building needs {', '.join(missing)}"
    if chosen.builds_anywhere:
        listed = ", ".join(CAPABILITIES)
        advice = f"name the compute capability to build for, as in --set tensorrt.capability=SM89 ({listed})"
        return f"{running}; {advice}" if running and not named else ""
    if wanted is not None:
        return f"{chosen.name} builds for the GPU of this machine only; leave tensorrt.capability out"
    return running


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


def target(options: TensorrtOptions) -> dict[str, str | None]:
    """What engines built here with these options are for: the package that runs them, and the GPU of this machine."""
    found, _ = gpus()
    here = f"{found[0].name} {found[0].capability}" if found else None
    return {"provider": provider(options.provider).name, "gpu": here}
