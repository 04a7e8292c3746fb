"""A CUDA driver and a TensorRT that compute on the host, for what a session does around them."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np

GPU = ("NVIDIA Test", 8, 9)


class FakeCuda:
    """The C functions of the driver over host memory; `calls` has their names in order."""

    def __init__(self, gpus: list[tuple[str, int, int]] | None = None):
        self.gpus = [GPU] if gpus is None else gpus
        self.calls: list[str] = []
        self.fails: dict[str, int] = {}
        self.memory: dict[int, Any] = {}
        self.enqueue: Any = None
        self.capturing = False
        self.captured: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        short = name.removesuffix("_v2")

        def call(*arguments: Any) -> int:
            self.calls.append(short)
            if short in self.fails:
                return self.fails[short]
            method = getattr(type(self), f"do_{short}", None)
            return (method(self, *arguments) if method else 0) or 0

        return call

    def do_cuGetErrorString(self, code: int, text: Any) -> None:
        text._obj.value = f"words of {code}".encode()

    def do_cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = len(self.gpus)

    def do_cuDeviceGet(self, device: Any, index: int) -> None:
        device._obj.value = index

    def do_cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
        name.value = self.gpus[device.value][0].encode()

    def do_cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> None:
        value._obj.value = self.gpus[device.value][attribute - 74]

    def do_cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:
        context._obj.value = 77

    def do_cuMemAlloc(self, address: Any, size: Any) -> None:
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.memory[ctypes.addressof(block)] = block

    def do_cuMemFree(self, address: Any) -> None:
        del self.memory[address.value]

    def do_cuStreamCreate(self, stream: Any, flags: int) -> None:
        stream._obj.value = 5

    def do_cuMemcpyHtoDAsync(self, address: Any, source: Any, size: Any, stream: Any) -> None:
        ctypes.memmove(address.value, source.value, size.value)

    def do_cuMemcpyDtoHAsync(self, target: Any, address: Any, size: Any, stream: Any) -> None:
        ctypes.memmove(target.value, address.value, size.value)

    def do_cuStreamBeginCapture(self, stream: Any, mode: int) -> None:
        self.capturing = True

    def do_cuStreamEndCapture(self, stream: Any, graph: Any) -> None:
        self.capturing = False
        graph._obj.value = 11

    def do_cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> None:
        executable._obj.value = 12

    def do_cuGraphLaunch(self, graph: Any, stream: Any) -> None:
        for work in self.captured:
            work()


class FakeTensorrt:
    """A provider's module whose engine computes y = 2 x + c on the addresses it is given."""

    class ILogger:
        class Severity:
            VERBOSE = "verbose"

        def __init__(self) -> None: ...

    def __init__(self, cuda: FakeCuda, *, loads: bool = True, capturable: bool | None = True):
        self.cuda, self.loads, self.capturable = cuda, loads, capturable
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.accepts = True

    def Runtime(self, log: Any) -> Any:
        if not self.loads:
            log.log(SimpleNamespace(name="ERROR"), "magic tag does not match")
        engine = SimpleNamespace(create_execution_context=lambda: self._context())
        return SimpleNamespace(deserialize_cuda_engine=lambda data: engine if self.loads else None)

    def _context(self) -> Any:
        context = SimpleNamespace(
            set_input_shape=lambda name, shape: self.accepts and self.shapes.update({name: shape}) is None,
            set_tensor_address=lambda name, address: self.addresses.update({name: address}) is None,
            execute_async_v3=self._execute,
        )
        if self.capturable is not None:
            context.is_stream_capturable = lambda stream: self.capturable
        return context

    def _execute(self, stream: int) -> bool:
        if self.cuda.capturing:
            self.cuda.captured = [self._compute]
        else:
            self._compute()
        return True

    def _compute(self) -> None:
        x, c = (self._array(name, self.shapes[name]) for name in ("x", "c"))
        self._array("y", self.shapes["x"])[:] = 2 * x + c

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[name])).reshape(shape)
