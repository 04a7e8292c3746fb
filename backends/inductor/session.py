"""Run a stage that AOTInductor compiled. PyTorch is loaded when a stage is opened, for its kernels."""

from __future__ import annotations

import platform
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...loop.errors import BundleError, StepfoldError, UsageError
from ...loop.held import StageFiles
from ...loop.ports import Port, StageCallable
from ..ports import check_ports, first_line, shapes
from .description import ObjectDescription
from .options import InductorOptions

Array = np.ndarray
AGAIN = "Build the bundle again on this machine with `stepfold optimize`."


def open_session(
    file: Path,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    *,
    threads: int | None = None,
    device: str = "cpu",
    options: InductorOptions,
    files: StageFiles | None = None,
) -> StageCallable:
    """Open a shared object, which is native code: nothing is unpickled and no Python of a model is imported.

    Args:
        file: the `.so` file, with its description beside it.
        inputs: what it must read.
        outputs: what it must compute.
        threads: number of threads of one kernel; None leaves it to PyTorch.
        device: `cpu`.
        options: options of the engine; what they decide is compiled in.
        files: files that may be read; None takes those of the folder.

    Returns:
        A function from name -> array to the outputs in the order of `outputs`. Threads that share it take turns.

    Raises:
        UsageError: the device is not the CPU, or this is another processor or PyTorch than the object is for.
        BundleError: the object cannot be opened, or has other inputs or outputs.
    """
    if device != "cpu":
        raise UsageError(f"device: expected cpu, the one this backend runs on; received {device!r}.")
    files = files or StageFiles(file.parent)
    description = ObjectDescription.read(file, files)
    check_ports(file, "input", _ports(description.input_ports()), inputs)
    check_ports(file, "output", _ports(description.output_ports()), outputs)
    _require_machine(file, description)
    return _Session(_runner(file, files), file.name, description, [port.name for port in outputs], threads)


def _ports(found: Sequence[Port]) -> dict[str, tuple[str, int]]:
    return {port.name: (port.dtype, len(port.shape)) for port in found}


def _require_machine(file: Path, description: ObjectDescription) -> None:
    """Raise UsageError where the code of an object would crash, or calls kernels that are not there."""
    import torch

    here = (sys.platform, platform.machine())
    if here != (description.system, description.machine):
        built = f"{description.system} {description.machine}"
        raise UsageError(f"{file}: expected {built}, which it was compiled for; this is {' '.join(here)}. {AGAIN}")
    able = torch.cpu.get_capabilities()
    missing = [name for name in description.instructions if not able.get(name)]
    if missing:
        raise UsageError(
            f"{file}: expected a processor with {', '.join(description.instructions)}, which it was compiled for; this "
            f"one lacks {', '.join(missing)}. {AGAIN}"
        )
    if _release(torch.__version__) != _release(description.torch):
        raise UsageError(
            f"{file}: expected PyTorch {_release(description.torch)}, which it was compiled by; received "
            f"{torch.__version__}. Install that one, or build the bundle again with `stepfold optimize`."
        )


def _release(version: str) -> str:
    """`2.13` of `2.13.0+cpu`: the kernels an object calls keep their form within it."""
    return ".".join(version.split(".")[:2])


def _runner(file: Path, files: StageFiles) -> Any:
    """The loaded object, opened through a link of a name that is new and in a folder where nothing else lies.

    The system's loader knows objects by their name and would give back the one that lay at this path before. PyTorch's
    would look beside the object for a list of operators to call back, and for objects of theirs, which it unpickles.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="stepfold-") as folder:
        link = Path(folder) / file.name
        try:
            held = files.open(file.name)  # stays open until the object is loaded
            link.symlink_to(held.address)
            return torch._C._aoti.AOTIModelContainerRunnerCpu(str(link), 1)  # type: ignore[attr-defined]
        except (OSError, RuntimeError) as error:
            reason = first_line(error).replace(str(link), file.name)
            raise BundleError(f"{file}: PyTorch {torch.__version__} cannot open it: {reason}") from error


class _Session:
    """A loaded object. It checks nothing on its own and would read past the end of an array that is too short."""

    def __init__(self, runner: Any, name: str, description: ObjectDescription, outputs: list[str], threads: int | None):
        computed = [port.name for port in description.output_ports()]
        self._runner = runner
        self._name = name
        self._inputs = description.input_ports()
        self._positions = [computed.index(output) for output in outputs]
        self._threads = threads
        self._lock = threading.Lock()

    def __call__(self, values: Mapping[str, Array]) -> list[Array]:
        import torch

        feed = {port.name: np.asarray(values[port.name]) for port in self._inputs}
        self._check(feed)
        # PyTorch warns of arrays that may not be written to, so those are copied; stages write to none.
        tensors = [torch.from_numpy(np.require(value, requirements=("C", "W"))) for value in feed.values()]
        with self._lock, _threads(self._threads), torch.no_grad():
            try:
                results = self._runner.run(tensors)
            except RuntimeError as error:
                raise StepfoldError(f"{self._name}: Inductor failed on {shapes(feed)}: {first_line(error)}") from error
            return [results[position].numpy().copy() for position in self._positions]  # an output may be an input

    def _check(self, feed: Mapping[str, Array]) -> None:
        batches = {feed[port.name].shape[:1] for port in self._inputs if port.shape[:1] == (None,)}
        if len(batches) > 1 or not all(_fits(feed[port.name], port) for port in self._inputs):
            wanted = ", ".join(str(port) for port in self._inputs)
            raise StepfoldError(f"{self._name}: expected {wanted}; received {shapes(feed)}.")


def _fits(value: Array, port: Port) -> bool:
    sizes = zip(value.shape, port.shape, strict=False)
    alike = value.ndim == len(port.shape) and all(there in (None, size) for size, there in sizes)
    return alike and value.dtype == port.dtype and value.size > 0


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Give kernels this number of threads, which belongs to the process, and give it back."""
    import torch

    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
