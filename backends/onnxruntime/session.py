"""Run a compiled stage with ONNX Runtime. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...loop.errors import BundleError, StepfoldError, UsageError
from ...loop.ports import Port, StageCallable
from ..ports import check_ports, first_line, shapes

Array = np.ndarray
ERRORS_ONLY = 3  # log severity
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ELEMENT_TYPES = {
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}


def open_session(
    file: Path,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    *,
    threads: int | None = None,
    device: str = "cpu",
) -> StageCallable:
    """Open an `.onnx` file, with the external data that lies beside it.

    Args:
        file: the model.
        inputs: what it must read.
        outputs: what it must compute.
        threads: for one operator; None leaves the number to ONNX Runtime.
        device: `cpu` or `cuda`.

    Returns:
        A function from name -> array to the outputs in the order of `outputs`.

    Raises:
        UsageError: the device is unknown or the installed package lacks it.
        BundleError: ONNX Runtime cannot load the file, or it has other inputs or outputs.
    """
    import onnxruntime

    provider = _provider(device, onnxruntime.get_available_providers())
    try:
        session = onnxruntime.InferenceSession(str(file), session_options(threads), providers=[provider])
    except Exception as error:  # ONNX Runtime has a dozen error classes without a common base
        raise BundleError(
            f"{file}: ONNX Runtime {onnxruntime.__version__} cannot load it: {first_line(error)}"
        ) from error
    if provider not in session.get_providers():
        raise UsageError(
            f"device {device!r}: expected a working {provider}; ONNX Runtime could not start it. Check that the CUDA "
            "and cuDNN libraries of this onnxruntime-gpu are installed, or use the device 'cpu'."
        )
    check_ports(file, "input", _ports(session.get_inputs()), inputs)
    check_ports(file, "output", _ports(session.get_outputs()), outputs)
    return _callable(session, file.name, inputs, [port.name for port in outputs])


def _provider(device: str, available: Sequence[str]) -> str:
    if device not in PROVIDERS:
        raise UsageError(f"device: expected one of {', '.join(PROVIDERS)}; received {device!r}.")
    provider = PROVIDERS[device]
    if provider not in available:
        raise UsageError(
            f"device {device!r}: the installed onnxruntime has no {provider}, only {', '.join(available)}. "
            "Replace it: pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )
    return provider


def session_options(threads: int | None) -> Any:
    """The options that every stage is opened with; `threads` as in `open_session`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.inter_op_num_threads = 1  # stages are chains: nothing to run side by side
    options.log_severity_level = ERRORS_ONLY
    # A bundle has several sessions, each with a thread pool that keeps spinning after its call: without this the
    # pools of the other stages and the driver fight for the cores, and a loop takes up to twice as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _ports(found: Sequence[Any]) -> dict[str, tuple[str, int]]:
    """Name -> dtype and rank."""
    return {str(node.name): (str(ELEMENT_TYPES.get(node.type, node.type)), len(node.shape)) for node in found}


def _callable(session: Any, name: str, inputs: tuple[Port, ...], outputs: list[str]) -> StageCallable:
    def call(values: Mapping[str, Array]) -> list[Array]:
        feed = {port.name: np.asarray(values[port.name], order="C") for port in inputs}
        try:
            return session.run(outputs, feed)
        except Exception as error:  # see above
            raise StepfoldError(f"{name}: ONNX Runtime failed on {shapes(feed)}: {first_line(error)}") from error

    return call
