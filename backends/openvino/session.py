"""Run a compiled stage with OpenVINO on the CPU. Torch-free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...loop.errors import BundleError, StepfoldError, UsageError
from ...loop.held import StageFiles
from ...loop.ports import Port, StageCallable
from ..ports import check_ports, shapes
from ..shared import SHARED
from .options import OpenvinoOptions

Array = np.ndarray
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
BATCH_SIZES = 4  # kept compiled: those of both branches of guidance and of one, for a full batch and for a rest
FRAMES = ("Exception from ", "Check '", "FrontEnd API failed", "Summary:")  # lines of an error that lead to its reason


def open_session(
    file: Path,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    *,
    threads: int | None = None,
    device: str = "cpu",
    options: OpenvinoOptions,
    files: StageFiles | None = None,
) -> StageCallable:
    """Open an `.xml` file with the weights that lie beside it, in its `.bin` file or in the one that stages share.

    Args:
        file: the model.
        inputs: what it must read.
        outputs: what it must compute.
        threads: number of threads of inference; None leaves it to OpenVINO.
        device: `cpu`.
        options: options of the engine.
        files: files that may be read; None takes those of the folder.

    Returns:
        A function from name -> array to the outputs in the order of `outputs`. Threads that share it take turns.

    Raises:
        UsageError: the device is not the CPU, or the processor lacks the precision.
        BundleError: OpenVINO cannot load the file, or it has other inputs or outputs.
    """
    import openvino

    if device != "cpu":
        raise UsageError(f"device: expected cpu, the one this backend runs on; received {device!r}.")
    core = openvino.Core()
    settings = settings_of(core, threads, options)
    graph, weights = _content(file, files or StageFiles(file.parent))

    def compiled(batch: int | None) -> Any:
        """The model for all batch sizes, or for one."""
        try:
            model = core.read_model(graph, openvino.Tensor(weights, shared_memory=True))
            if batch is not None:
                model.reshape({port.name: [batch, *port.shape[1:]] for port in inputs if _batched(port)})
            return core.compile_model(model, "CPU", settings)
        except Exception as error:  # RuntimeError, and what the bindings raise for a file they cannot parse
            raise _unloadable(file, error) from error

    dynamic = compiled(None)  # whatever the shapes will be: a damaged file is found at once
    check_ports(file, "input", _ports(dynamic.inputs, inputs), inputs)
    check_ports(file, "output", _ports(dynamic.outputs, outputs), outputs)
    batched = next((port.name for port in inputs if _batched(port)), None)
    if options.shapes == "static" and batched is not None:
        return _ByBatch(lambda batch: _Session(compiled(batch), weights, file.name, inputs, outputs), batched)
    return _Session(dynamic, weights, file.name, inputs, outputs)


def _content(file: Path, files: StageFiles) -> tuple[bytes, Array]:
    """The graph of a model, and its weights, mapped into memory.

    Raises:
        BundleError: a file is missing, or is no IR: other formats name files of their own.
    """
    try:
        graph = files.open(file.name).read()
        if not graph.lstrip().startswith(b"<"):
            raise _unloadable(file, ValueError("expected OpenVINO IR, which is XML"))
        return graph, files.open(weights_of(file, files)).mapped()
    except OSError as error:
        raise _unloadable(file, error) from error


def _unloadable(file: Path, error: Exception) -> BundleError:
    import openvino

    version = openvino.get_version().partition("-")[0]
    return BundleError(f"{file}: OpenVINO {version} cannot load it: {reason(error)}")


def weights_of(file: Path, files: StageFiles) -> str:
    """The file with the weights of an `.xml` file: the `.bin` of its name, or the one that stages share."""
    own = file.with_suffix(".bin").name
    return SHARED if files.has(SHARED) and not files.has(own) else own


def settings_of(core: Any, threads: int | None, options: OpenvinoOptions) -> dict[str, Any]:
    """The properties a stage is compiled with.

    Raises:
        UsageError: the processor lacks the precision.
    """
    precision = PRECISIONS[options.precision]
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision != "f32" and precision.upper() not in able:
        raise UsageError(
            f"openvino.precision: expected one that this processor has ({', '.join(able)}); received "
            f"{options.precision!r}. Build the bundle with --set openvino.precision=fp32."
        )
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        # The plugin would choose bf16 on its own where the processor has it.
        "INFERENCE_PRECISION_HINT": precision,
    }
    return settings if threads is None else {**settings, "INFERENCE_NUM_THREADS": threads}


def reason(error: BaseException) -> str:
    """What an error of OpenVINO says after the places in its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(FRAMES)] or lines[-1:]
    return " ".join(said) or type(error).__name__


class _Session:
    """A compiled model with one inference request, used again for every call."""

    def __init__(self, compiled: Any, weights: Array, name: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...]):
        self._weights = weights  # the model refers to this memory and does not own it
        self._compiled = compiled
        self._name = name
        self._inputs = inputs
        self._batched = [i for i, port in enumerate(outputs) if _batched(port)]
        positions = _positions(compiled.outputs)
        self._positions = [positions[port.name] for port in outputs]
        self._lock = threading.Lock()
        self._request = compiled.create_infer_request()

    def __call__(self, values: Mapping[str, Array]) -> list[Array]:
        feed = {port.name: np.asarray(values[port.name], order="C") for port in self._inputs}
        batch = self._checked_batch(feed)
        with self._lock:
            try:
                self._request.infer(feed, share_inputs=True)
            except Exception as error:  # see above
                self._request = self._compiled.create_infer_request()  # after a failure, this one goes on failing
                raise StepfoldError(f"{self._name}: OpenVINO failed on {shapes(feed)}: {reason(error)}") from error
            results = [np.array(self._request.get_output_tensor(position).data) for position in self._positions]
        self._check_results(batch, results)
        return results

    def _checked_batch(self, feed: Mapping[str, Array]) -> int | None:
        """The batch of a request, None where no input has one.

        The engine converts other types in silence, and fused layers take inputs of different batches without an error.
        """
        batches = {len(feed[port.name]) for port in self._inputs if _batched(port)}
        typed = all(feed[port.name].dtype == port.dtype for port in self._inputs)
        if len(batches) > 1 or not typed:
            wanted = ", ".join(str(port) for port in self._inputs)
            raise StepfoldError(f"{self._name}: expected {wanted}; received {shapes(feed)}.")
        return next(iter(batches), None)

    def _check_results(self, batch: int | None, results: Sequence[Array]) -> None:
        """With `ONEDNN_VERBOSE` set, OpenVINO 2026.4 gives empty outputs instead of an error."""
        received = {len(results[i]) for i in self._batched}
        if batch is not None and received - {batch}:
            raise StepfoldError(
                f"{self._name}: expected outputs of batch {batch}; OpenVINO gave {sorted(received)} and no error. "
                "Unset ONEDNN_VERBOSE, if it is set."
            )


class _ByBatch:
    """A session for each batch size; the last few stay open."""

    def __init__(self, open_for: Callable[[int], _Session], batched: str):
        self._open_for = open_for
        self._batched = batched  # an input that has a batch; a session checks that the others have the same
        self._lock = threading.Lock()
        self._sessions: dict[int, _Session] = {}

    def __call__(self, values: Mapping[str, Array]) -> list[Array]:
        batch = len(values[self._batched])
        with self._lock:
            session = self._sessions.pop(batch, None) or self._open_for(batch)
            self._sessions[batch] = session  # the one that was used last is the last to be closed
            if len(self._sessions) > BATCH_SIZES:
                del self._sessions[next(iter(self._sessions))]
        return session(values)


def _batched(port: Port) -> bool:
    return port.shape[:1] == (None,)


def _ports(found: Sequence[Any], expected: Sequence[Port]) -> dict[str, tuple[str, int]]:
    """Name -> dtype and rank; a value keeps the names of others that it was found to equal, which are no ports."""
    wanted = {port.name for port in expected}
    return {
        name: (np.dtype(node.element_type.to_dtype()).name, node.partial_shape.rank.get_length())
        for node in found
        for name in (node.names & wanted or sorted(node.names)[:1])
    }


def _positions(found: Sequence[Any]) -> dict[str, int]:
    return {name: i for i, node in enumerate(found) for name in node.names}
