"""Run a compiled stage with ONNX Runtime. Torch-free."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...loop.errors import BundleError, StepfoldError, UsageError
from ...loop.held import HeldFile, StageFiles, utf8_folder
from ...loop.ports import Port, StageCallable
from ..ports import check_ports, first_line, shapes
from .external import external_files
from .options import OnnxruntimeOptions, Provider
from .parts import InParts, divisible

Array = np.ndarray
ERRORS_ONLY = 3  # log severity
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS: dict[Provider, tuple[str, ...]] = {"cpu": (CPU,), "cuda": (CUDA,), "tensorrt": (TENSORRT, CUDA)}
"""What runs a stage, in the order of preference; the first has to start. ONNX Runtime adds the CPU at the end."""
DEVICES = ("cpu", "cuda")
SLOWER = ("SkipLayerNormFusion",)
"""Optimizers that are left off on the CPU. The kernel of a norm of a sum takes three times as long there and more as the two
operators it stands for, whose kernels are vectorized (ONNX Runtime 1.31; docs/backends/onnxruntime.md)."""
GPU = 0  # the first that the process may use
DEFAULTS = OnnxruntimeOptions()
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
    options: OnnxruntimeOptions = DEFAULTS,
    files: StageFiles | None = None,
) -> StageCallable:
    """Open an `.onnx` file, with the external data that lies beside it.

    Args:
        file: the model.
        inputs: what it must read.
        outputs: what it must compute.
        threads: number of threads to compute with; None leaves it to ONNX Runtime, which takes one for each core.
        device: `cpu` or `cuda`; where it is not the one of the provider, the provider of that name is taken.
        options: options of the engine.
        files: files that may be read; None takes those of the folder.

    Returns:
        A function from name -> array to the outputs in the order of `outputs`. On a GPU, threads that share it take
        turns.

    Raises:
        UsageError: the device is unknown or the installed package lacks the provider.
        BundleError: ONNX Runtime cannot load the file, it has other inputs or outputs, or it reads another file.
    """
    import onnxruntime

    names = providers(device, options, onnxruntime.get_available_providers())
    files = files or StageFiles(file.parent)
    if names[0] != CPU:
        session = _checked(file, files, inputs, outputs, names, threads)
        return BoundSession(session, file.name, inputs, outputs, "cuda")

    def open_with(threads: int | None) -> StageCallable:
        session = _checked(file, files, inputs, outputs, names, threads)
        return _callable(session, file.name, inputs, [port.name for port in outputs])

    if options.rows is None or not divisible(inputs, outputs):
        return open_with(threads)
    return InParts(open_with, inputs, outputs, options.rows, threads)


def own_content(file: Path, files: StageFiles) -> tuple[bytes, list[HeldFile]]:
    """The bytes of a model, and the files among these that it reads its weights from.

    Raises:
        BundleError: it cannot be read, is no ONNX model, or names another file.
    """
    try:
        model = files.open(file.name).read()
        wanted = external_files(model)
    except (OSError, ValueError) as error:
        raise _unloadable(file, error) from error
    foreign = sorted(name for name in wanted if not files.has(name))
    if foreign:
        raise BundleError(
            f"{file}: expected weights in the files of the bundle beside it; it reads {foreign[0]!r:.200}, which is none "
            "of them. Do not use this bundle, or build it again with `stepfold optimize`."
        )
    return model, [files.open(name) for name in sorted(wanted)]


def _checked(
    file: Path,
    files: StageFiles,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    names: Sequence[str],
    threads: int | None,
) -> Any:
    """A session on execution providers, the first of which it has to have; see `open_session`."""
    import onnxruntime

    settings = session_options(threads)
    settings.add_session_config_entry("session.load_model_format", "ONNX")  # its own format names files elsewhere
    model, weights = own_content(file, files)
    try:
        with utf8_folder(file.parent) as folder:
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
            session = onnxruntime.InferenceSession(model, settings, **on(names))
    except UsageError:
        raise
    except Exception as error:  # ONNX Runtime has a dozen error classes without a common base
        raise _unloadable(file, error) from error
    # ONNX Runtime takes weights in files only by their path, unless they are copied twice
    changed = [held for held in weights if not held.lies_at_its_path()]
    if changed:
        raise BundleError(
            f"{changed[0]}: expected the file that was checked; it was replaced, moved or written while the bundle was "
            "opened. Load the bundle again when nobody changes it."
        )
    if names[0] not in session.get_providers():
        raise UsageError(
            f"{names[0]}: expected to start; ONNX Runtime could not start it. Check that the libraries of this "
            "onnxruntime-gpu (CUDA and cuDNN, TensorRT) are installed, or use the device 'cpu'."
        )
    check_ports(file, "input", _ports(session.get_inputs()), inputs)
    check_ports(file, "output", _ports(session.get_outputs()), outputs)
    session._model_bytes = None  # it would keep them, to start again on other providers
    return session


def _unloadable(file: Path, error: Exception) -> BundleError:
    import onnxruntime

    return BundleError(f"{file}: ONNX Runtime {onnxruntime.__version__} cannot load it: {first_line(error)}")


def providers(device: str, options: OnnxruntimeOptions, available: Sequence[str]) -> tuple[str, ...]:
    """The execution providers of a session.

    Args:
        device: `cpu` or `cuda`.
        options: options of the engine.
        available: providers that the installed package has.

    Raises:
        UsageError: the device is unknown or the package lacks the provider.
    """
    if device not in DEVICES:
        raise UsageError(f"device: expected one of {', '.join(DEVICES)}; received {device!r}.")
    chosen: Provider = options.provider if options.device == device else "cuda" if device == "cuda" else "cpu"
    names = PROVIDERS[chosen]
    if names[0] not in available:
        raise UsageError(
            f"device {device!r}: the installed onnxruntime has no {names[0]}, only {', '.join(available)}. "
            "Replace it: pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )
    return tuple(name for name in names if name in available)


def on(names: Sequence[str]) -> dict[str, Any]:
    """What a session takes beside its options to run on these execution providers."""
    return {"providers": list(names), "disabled_optimizers": list(SLOWER) if names[0] == CPU else []}


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


class BoundSession:
    """A session on a device, whose inputs lie in buffers there that are written again for every call of their shape."""

    def __init__(self, session: Any, name: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...], device: str):
        """Bind outputs to the device; see `open_session`.

        Args:
            session: an `onnxruntime.InferenceSession`.
            name: name of the file, for messages.
            inputs: what it reads.
            outputs: what it computes.
            device: `cuda`, or `cpu`, where tests bind.
        """
        self._session = session
        self._name = name
        self._inputs = inputs
        self._outputs = [port.name for port in outputs]
        self._device = device
        self._buffers: dict[str, tuple[tuple[Any, ...], Any]] = {}  # name -> shape and type, buffer
        self._lock = threading.Lock()

    def __call__(self, values: Mapping[str, Array]) -> list[Array]:
        """Name -> array to the outputs in order; both are the caller's own."""
        feed = {port.name: np.asarray(values[port.name], order="C") for port in self._inputs}
        with self._lock:
            try:
                return self._run(feed)
            except Exception as error:  # ONNX Runtime has a dozen error classes without a common base
                self._buffers.clear()
                raise StepfoldError(
                    f"{self._name}: ONNX Runtime failed on {shapes(feed)}: {first_line(error)}"
                ) from error

    def _run(self, feed: Mapping[str, Array]) -> list[Array]:
        binding = self._session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, self._written(name, value))
        for name in self._outputs:
            binding.bind_output(name, self._device, GPU)
        self._session.run_with_iobinding(binding)
        return list(binding.copy_outputs_to_cpu())

    def _written(self, name: str, value: Array) -> Any:
        """The buffer of an input with this value in it."""
        import onnxruntime

        held = self._buffers.get(name)
        if held is None or held[0] != (value.shape, value.dtype):
            # not from the array: on the CPU the buffer would be the caller's own memory, which is written to below
            empty = onnxruntime.OrtValue.ortvalue_from_shape_and_type(value.shape, value.dtype, self._device, GPU)
            held = self._buffers[name] = ((value.shape, value.dtype), empty)
        held[1].update_inplace(value)
        return held[1]
