"""The few functions of the CUDA driver that a session needs, through ctypes: the driver is there wherever a GPU works.

Nothing is installed for it, and asking for the GPUs of a machine imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...loop.errors import StepfoldError, UsageError

LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
NAME_BYTES = 256

Array = np.ndarray


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine; `capability` is written as in `SM89`."""

    index: int
    name: str
    capability: str


class Driver:
    """The CUDA driver; its functions raise StepfoldError with the driver's own words."""

    def __init__(self, library: Any):
        """Start the driver; `library` has its C functions.

        Raises:
            StepfoldError: there is no working driver.
        """
        self._library = library
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._call("cuInit", 0)

    def gpus(self) -> list[Gpu]:
        """Every GPU the process may use."""
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return [self._gpu(index) for index in range(count.value)]

    def _gpu(self, index: int) -> Gpu:
        device, name = ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES)
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDeviceGetName", name, NAME_BYTES, device)
        numbers = []
        for attribute in (MAJOR, MINOR):
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        return Gpu(index, name.value.decode(errors="replace"), f"SM{numbers[0]}{numbers[1]}")

    def use(self, index: int) -> None:
        """Make the primary context of a GPU, the one its runtime library uses too, current in this thread."""
        if index not in self._contexts:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(device), index)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[index] = context
        self._call("cuCtxSetCurrent", self._contexts[index])

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes of device memory."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def stream(self) -> int:
        """A new stream that waits for no other."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def upload(self, address: int, array: Array, stream: int) -> None:
        """Copy a contiguous array to the device; it must live until the stream is synchronized."""
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), *_memory(array), ctypes.c_void_p(stream))

    def download(self, array: Array, address: int, stream: int) -> None:
        """Copy device memory into a contiguous array, which is filled once the stream is synchronized."""
        pointer, size = _memory(array)
        self._call("cuMemcpyDtoHAsync_v2", pointer, ctypes.c_uint64(address), size, ctypes.c_void_p(stream))

    def synchronize(self, stream: int) -> None:
        """Wait until everything given to a stream is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def begin_capture(self, stream: int) -> None:
        """Record what is given to a stream instead of running it."""
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """What was recorded, as a graph that can be launched."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        finally:
            self._call("cuGraphDestroy", graph)
        return executable.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Run a graph on a stream."""
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            advice = " Use a smaller batch, or free memory on the GPU." if code == OUT_OF_MEMORY else ""
            raise StepfoldError(f"CUDA: {name} failed: {self._words(code)}.{advice}")

    def _words(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return text.value.decode(errors="replace") if text.value else f"error {code}"


def _memory(array: Array) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)


@functools.cache
def open_driver() -> Driver:
    """The driver of this machine.

    Raises:
        UsageError: there is none, or it does not work.
    """
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        try:
            return Driver(library)
        except StepfoldError as error:
            raise UsageError(f"no NVIDIA GPU works here: {error}") from error
    raise UsageError("no NVIDIA GPU was found: its driver (libcuda.so.1) is not installed.")


def gpus() -> tuple[list[Gpu], str]:
    """The GPUs of this machine, and why there are none; never fails."""
    try:
        found = open_driver().gpus()
    except StepfoldError as error:
        return [], str(error).rstrip(".")
    return found, "" if found else "the NVIDIA driver reports no GPU"
