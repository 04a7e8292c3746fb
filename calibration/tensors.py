"""Safetensors files read and written one tensor at a time.

The library maps a whole file or takes all tensors at once; here a file of any size needs the memory of one tensor, and
a full disk is an `OSError`. What is written is read by the library, and the other way round.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

Array = np.ndarray
Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]

TYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8"}
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
LENGTH_BYTES = 8
ALIGNMENT = 8
CHUNK_BYTES = 1 << 20
METADATA = "__metadata__"


class TensorFileError(ValueError):
    """A file is not safetensors, is cut short, or holds something else than expected."""


def write_tensors(stream: IO[bytes], shapes: Shapes, arrays: Iterable[Array], metadata: Mapping[str, str]) -> None:
    """Write a file.

    Args:
        stream: stream to write to.
        shapes: dtype and shape by name, in the order of `arrays`.
        arrays: one for each name; taken one at a time.
        metadata: text.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)}
    start = 0
    for name, (dtype, shape) in shapes.items():
        end = start + dtype.itemsize * prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    for (name, (dtype, shape)), array in zip(shapes.items(), arrays, strict=True):
        assert array.dtype == dtype and array.shape == shape, f"{name}: {array.dtype} {array.shape}"
        stream.write(stored(array))


def stored(array: Array) -> memoryview:
    """The bytes of an array as they stand in a file."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).data.cast("B")


def digest_of(shapes: Shapes, chunks: Iterable[Any]) -> str:
    """SHA-256 over names, dtypes, shapes and data, which goes into the metadata of a file that has to be checked later.

    Args:
        shapes: dtype and shape by name, in the order of the file.
        chunks: the data after the header, as it stands in the file.
    """
    outline = [[name, NAMES[dtype], list(shape)] for name, (dtype, shape) in shapes.items()]
    digest = hashlib.sha256(json.dumps(outline).encode())
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def shapes_of(arrays: Mapping[str, Array]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape of each array."""
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


@dataclass(frozen=True)
class TensorFile:
    """The header of a file whose size was checked.

    Attributes:
        path: the file.
        metadata: text.
        shapes: dtype and shape by name.
        offsets: first byte by name.
        data: first byte after the header.
    """

    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
    offsets: Mapping[str, int]
    data: int

    def read(self, name: str) -> Array:
        """One tensor.

        Raises:
            TensorFileError: there is none of that name, or the file was cut short since it was opened.
        """
        if name not in self.shapes:
            raise TensorFileError(f"no tensor {name!r}")
        dtype, shape = self.shapes[name]
        array = np.fromfile(self.path, dtype, prod(shape), offset=self.offsets[name])
        if array.size != prod(shape):
            raise TensorFileError(f"tensor {name!r} is cut short")
        return array.reshape(shape)

    def digest(self) -> str:
        """See `digest_of`; reads the whole file.

        Raises:
            OSError: it cannot be read.
        """
        with self.path.open("rb") as stream:
            stream.seek(self.data)
            return digest_of(self.shapes, iter(lambda: stream.read(CHUNK_BYTES), b""))


def open_tensors(path: Path) -> TensorFile:
    """Read the header of a file.

    Raises:
        TensorFileError: it is not a whole safetensors file.
        OSError: it cannot be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its other end
        raise TensorFileError("it is no regular file")
    size = found.st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise TensorFileError(f"cut short: {size} bytes, a header of {length}")
        text = stream.read(length)
    try:
        header = json.loads(text)
        metadata = {str(k): str(v) for k, v in header.pop(METADATA, {}).items()}
        entries = {name: _entry(item) for name, item in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TensorFileError(f"its header is damaged: {error}") from None
    data = LENGTH_BYTES + length
    end = data + max((stop for *_, stop in entries.values()), default=0)
    if end != size:
        raise TensorFileError(f"expected {end} bytes; received {size}")
    shapes = {name: (dtype, shape) for name, (dtype, shape, _, _) in entries.items()}
    offsets = {name: data + start for name, (_, _, start, _) in entries.items()}
    return TensorFile(path, metadata, shapes, offsets, data)


def _entry(item: Mapping[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    dtype, shape = np.dtype(TYPES[item["dtype"]]), tuple(int(size) for size in item["shape"])
    start, stop = (int(offset) for offset in item["data_offsets"])
    if min((*shape, start), default=0) < 0 or stop - start != dtype.itemsize * prod(shape):
        raise ValueError(f"a tensor of shape {list(shape)} at bytes {start} to {stop}")
    return dtype, shape, start, stop
