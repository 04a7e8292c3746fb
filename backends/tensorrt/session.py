"""Run a plan on a GPU. Torch-free."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...loop.errors import BundleError, StepfoldError, UsageError
from ...loop.held import StageFiles
from ...loop.ports import Port, StageCallable
from .cuda import Driver, Gpu, open_driver
from .description import PlanDescription
from .options import PlanOptions
from .provider import PROVIDERS, Provider, collected, logger

Array = np.ndarray
DEVICE = "cuda"


def open_session(
    file: Path,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    *,
    threads: int | None = None,
    device: str = DEVICE,
    options: PlanOptions | None = None,
    files: StageFiles | None = None,
) -> StageCallable:
    """Open a plan on the first GPU.

    Args:
        file: the plan, with its description beside it.
        inputs: what it must read.
        outputs: what it must compute.
        threads: has no meaning here.
        device: `cuda`.
        options: it was built with; what a session needs is in the description.
        files: files that may be read; None takes those of the folder.

    Returns:
        A function from name -> array to the outputs in the order of `outputs`; arrays are copied to the GPU and back.

    Raises:
        UsageError: there is no GPU, the provider is missing, or the plan is for another device or version.
        BundleError: the plan is damaged, or has other inputs or outputs.
    """
    if device != DEVICE:
        raise UsageError(f"device: expected {DEVICE}, the only one of TensorRT; received {device!r}.")
    files = files or StageFiles(file.parent)
    plan = PlanDescription.read(file, files)
    check_ports(file, plan, inputs, outputs)
    provider = next((candidate for candidate in PROVIDERS if candidate.name == plan.provider), None)
    if provider is None:
        raise BundleError(f"{file}: expected a plan of {' or '.join(p.name for p in PROVIDERS)}; {plan.provider!r}.")
    driver = open_driver()
    gpus = driver.gpus()
    check_target(file, plan, provider, gpus)
    return Session(file, files, plan, provider, driver, gpus[0], [port.name for port in outputs])


def check_ports(file: Path, plan: PlanDescription, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Raise BundleError unless a plan has these inputs and outputs."""
    for kind, expected, received in (
        ("inputs", inputs, plan.input_ports()),
        ("outputs", outputs, plan.output_ports()),
    ):
        if set(expected) != set(received):
            raise BundleError(
                f"{file}: expected the {kind} {_listed(expected)}; received {_listed(received)}. "
                "Build the bundle again with `stepfold optimize`."
            )


def _listed(ports: Sequence[Port]) -> str:
    return ", ".join(sorted(str(port) for port in ports)) or "none"


def check_target(file: Path, plan: PlanDescription, provider: Provider, gpus: Sequence[Gpu]) -> None:
    """Raise UsageError unless a plan was built for the version and the GPU that are here; nothing of it is read."""
    if plan.provider_version != provider.version:
        raise UsageError(
            f"{file.name}: built by {provider.name} {plan.provider_version}; here is {provider.version or 'none'}. "
            f"Install that version, or build the bundle again with this one. {provider.install}"
        )
    if not gpus:
        raise UsageError(f"{file.name}: built for a GPU of {plan.capability}; the NVIDIA driver here reports none.")
    if gpus[0].capability != plan.capability:
        raise UsageError(
            f"{file.name}: built for {plan.capability}; the GPU here is {gpus[0].name}, {gpus[0].capability}. Build the "
            f"bundle again with --set tensorrt.capability={gpus[0].capability}."
        )


@dataclass
class Buffer:
    """Device memory of one input or output, which grows with the batch."""

    driver: Driver
    address: int = 0
    size: int = 0

    def reserve(self, size: int) -> bool:
        """Make room for `size` bytes; whether the address changed."""
        if size <= self.size and self.address:
            return False
        self.free()
        self.address = self.driver.allocate(size)
        self.size = size
        return True

    def free(self) -> None:
        """Give the memory back."""
        if self.address:
            self.driver.free(self.address)
            self.address = self.size = 0


@dataclass
class Session:
    """A plan with its memory on the device.

    The second call in a row with one batch is recorded as a CUDA graph and the later ones replay it, which spares the
    launches of hundreds of small kernels. Another batch or moved memory changes what the graph was recorded from, so
    it is forgotten then. A session runs one call at a time.
    """

    file: Path
    files: StageFiles
    plan: PlanDescription
    provider: Provider
    driver: Driver
    gpu: Gpu
    outputs: list[str]
    buffers: dict[str, Buffer] = field(default_factory=dict)
    batch: int | None = None
    runs: int = 0
    graph: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.stream = 0
        self.driver.use(self.gpu.index)
        tensorrt = self.provider.load()
        with collected(tensorrt) as messages:
            self.runtime = tensorrt.Runtime(logger(tensorrt))
            self.engine = self.runtime.deserialize_cuda_engine(self.files.open(self.file.name).read())
            context = self.engine.create_execution_context() if self.engine is not None else None
        if context is None:
            said = next((m.text for m in messages if m.severity.endswith("ERROR")), "it gives no reason")
            raise BundleError(
                f"{self.file}: {self.provider.name} {self.provider.version} cannot load it: {said}. Build it again."
            )
        self.context: Any = context
        self.stream = self.driver.stream()
        self.buffers = {
            port.name: Buffer(self.driver) for port in (*self.plan.input_ports(), *self.plan.output_ports())
        }

    def __call__(self, values: Mapping[str, Array]) -> list[Array]:
        """Run the plan on named arrays [B, ...].

        Raises:
            StepfoldError: the batch is outside of the profile, an array has another shape or type, or the GPU failed.
        """
        arrays = {port.name: self._checked(port, values[port.name]) for port in self.plan.input_ports()}
        batch = self._batch(arrays)
        with self.lock:
            self.driver.use(self.gpu.index)  # of this thread
            return self._run(arrays, batch)

    def close(self) -> None:
        """Give memory, graph and stream back."""
        self.driver.use(self.gpu.index)
        for buffer in self.buffers.values():
            buffer.free()
        self._forget_graph()
        if self.stream:
            self.driver.destroy_stream(self.stream)
            self.stream = 0

    def __del__(self) -> None:
        with suppress(StepfoldError, AttributeError, TypeError):  # half made, or the interpreter is ending
            self.close()

    def _checked(self, port: Port, value: Array) -> Array:
        array = np.ascontiguousarray(value)
        fits = len(array.shape) == len(port.shape) and all(
            size in (None, got) for size, got in zip(port.shape, array.shape, strict=True)
        )
        if not fits or str(array.dtype) != port.dtype:
            raise StepfoldError(f"{self.file.name}: expected {port}; received {list(array.shape)} {array.dtype}.")
        return array

    def _batch(self, arrays: Mapping[str, Array]) -> int:
        """The batch of a call, 0 where nothing has one."""
        batches = {p.name: len(arrays[p.name]) for p in self.plan.input_ports() if p.shape[:1] == (None,)}
        if not batches or self.plan.batch is None:
            return 0
        batch, profile = next(iter(batches.values())), self.plan.batch
        if set(batches.values()) != {batch}:
            raise StepfoldError(f"{self.file.name}: expected one batch for all inputs; received {batches}.")
        if not profile.min <= batch <= profile.max:
            raise StepfoldError(
                f"{self.file.name}: expected a batch of {profile.min} to {profile.max}, guidance branches counted; "
                f"received {batch}. Ask for fewer samples at once, or build with --set tensorrt.max_batch={batch}."
            )
        return batch

    def _run(self, arrays: Mapping[str, Array], batch: int) -> list[Array]:
        results = {
            port.name: np.empty([batch if size is None else size for size in port.shape], port.dtype)
            for port in self.plan.output_ports()
        }
        self._arrange(arrays, results, batch)
        for name, array in arrays.items():
            self.driver.upload(self.buffers[name].address, array, self.stream)
        self._enqueue()
        for name, array in results.items():
            self.driver.download(array, self.buffers[name].address, self.stream)
        self.driver.synchronize(self.stream)
        return [results[name] for name in self.outputs]

    def _arrange(self, arrays: Mapping[str, Array], results: Mapping[str, Array], batch: int) -> None:
        """Room on the device for a batch, and its shapes; nothing is touched while the batch stays."""
        if batch == self.batch:
            return
        self._forget_graph()
        self.batch = None  # until everything is in place
        for name, array in {**arrays, **results}.items():
            if self.buffers[name].reserve(array.nbytes):
                self._require(
                    self.context.set_tensor_address(self.plan.tensor(name), self.buffers[name].address),
                    f"memory of {name!r}",
                )
        for name, array in arrays.items():
            self._require(
                self.context.set_input_shape(self.plan.tensor(name), tuple(array.shape)), f"the shape of {name!r}"
            )
        self.batch = batch

    def _enqueue(self) -> None:
        self.runs += 1
        if self.runs == 2 and self._capturable():
            self.driver.begin_capture(self.stream)
            try:
                enqueued = self.context.execute_async_v3(self.stream)
            finally:
                self.graph = self.driver.end_capture(self.stream)
            self._require(enqueued, "the recording of the call")
        if self.graph:
            self.driver.launch(self.graph, self.stream)
        else:
            self._require(self.context.execute_async_v3(self.stream), "the call")

    def _capturable(self) -> bool:
        """Whether the call can be recorded: TensorRT-RTX says so, as it compiles kernels while it runs."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(self.stream))

    def _forget_graph(self) -> None:
        if self.graph:
            self.driver.destroy_graph(self.graph)
        self.graph = self.runs = 0

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise StepfoldError(f"{self.file.name}: {self.provider.name} refused {what}. Build the bundle again.")
