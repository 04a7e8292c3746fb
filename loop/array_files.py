"""Arrays that somebody else wrote: `.npy` and safetensors files, whose headers are checked before they are believed."""

from __future__ import annotations

import os
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from .held import Source
from .reading import Expected, opened, parse_json

Array = np.ndarray
LARGEST_HEADER_BYTES = 100_000_000  # of safetensors, as its own library has it
LARGEST_DIMENSION = 1 << 48  # a size that NumPy, PyTorch and the engines can still multiply
LENGTH_BYTES = 8
METADATA = "__metadata__"
DAMAGED = "it is damaged or truncated"
BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Dtypes of safetensors with the bits of a value."""
NUMPY: Mapping[str, str] = {
    "BOOL": "?",
    **{
        f"{kind}{8 * size}": f"<{kind.lower()}{size}"
        for kind in "UIF"
        for size in (1, 2, 4, 8)
        if kind + str(size) != "F1"
    },
}
"""Those that NumPy has."""
# What NumPy raises about a header it does not like: it is a Python literal, read by Python's own parser.
HEADER_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file.

    Attributes:
        dtype: its name there, such as `F32`.
        shape: its sizes.
        start: its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int


def tensor_entries(path: Path, expected: Expected) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, from its header.

    Raises:
        StepfoldError: the file cannot be read, its header is damaged, a tensor has an unknown dtype or a shape that
            does not fit its bytes, tensors overlap, or the file is longer or shorter than they are.
    """
    with opened(path, expected) as stream:
        return _entries(stream, path, expected)


def read_arrays(path: Source, expected: Expected) -> dict[str, Array]:
    """The arrays of a safetensors file by name; raises as `tensor_entries` does, and for dtypes that NumPy lacks."""
    with opened(path, expected) as stream:
        found = {}
        for name, entry in _entries(stream, path, expected).items():
            if entry.dtype not in NUMPY:
                raise expected.refusal(path, f"{name!r:.80} is of {entry.dtype}, which NumPy lacks")
            found[name] = _array(stream, np.dtype(NUMPY[entry.dtype]), entry.shape, entry.start)
        return found


def _array(stream: IO[bytes], dtype: np.dtype, shape: tuple[int, ...], start: int) -> Array:
    stream.seek(start)
    return np.fromfile(stream, dtype, prod(shape)).reshape(shape)


def _entries(stream: IO[bytes], path: Source, expected: Expected) -> dict[str, TensorEntry]:
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, LARGEST_HEADER_BYTES):
        raise expected.refusal(path, f"{DAMAGED}: {size:,} bytes with a header of {length:,}")
    header = parse_json(stream.read(length), f"{path}: its header", expected)
    try:
        if not isinstance(header, dict):
            raise ValueError(f"a header that is a {type(header).__name__}")  # noqa: TRY004 (of the file, not of a call)
        _check_metadata(header.pop(METADATA, {}))
        spans = {name: _span(name, entry) for name, entry in header.items()}
        _check_spans(spans, size - LENGTH_BYTES - length)
    except ValueError as problem:
        raise expected.refusal(path, f"{DAMAGED}: {problem}") from None
    first = LENGTH_BYTES + length
    return {
        name: TensorEntry(header[name]["dtype"], tuple(header[name]["shape"]), first + start)
        for name, (start, _) in spans.items()
    }


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"expected {METADATA} to be text by name")


def _span(name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor, after its dtype, shape and offsets were checked."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r:.80} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r:.80} has the unknown dtype {dtype!r:.40}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r:.80} has shape {shape!r:.80} at bytes {offsets!r:.80}")
    start, stop = offsets
    if (stop - start) * 8 != BITS[dtype] * prod(shape):
        raise ValueError(f"{name!r:.80} of {dtype} {shape} stands at bytes {start} to {stop}")
    return start, stop


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= LARGEST_DIMENSION for size in value)


def _check_spans(spans: Mapping[str, tuple[int, int]], size: int) -> None:
    """Raise ValueError unless the tensors follow each other and fill the data."""
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end:
            raise ValueError(f"{name!r:.80} begins at byte {start}, where {end} was expected")
        end = stop
    if end != size:
        raise ValueError(f"its tensors have {end:,} bytes; received {size:,}")


def read_npy(path: Path, expected: Expected) -> Array:
    """The array of a `.npy` file; nothing in it is unpickled.

    Raises:
        StepfoldError: the file cannot be read, its header is damaged, it holds something else than numbers, or
            more or fewer than its shape says.
    """
    with opened(path, expected) as stream:
        try:
            shape, in_columns, dtype = _npy_header(stream)
        except HEADER_ERRORS as problem:
            reason = next(iter(str(problem).splitlines()), type(problem).__name__)
            raise expected.refusal(path, f"its header is damaged: {reason:.200}") from None
        if dtype.kind not in "fiub":
            raise expected.refusal(path, f"received values of {dtype}, which are no numbers")
        wanted, have = prod(shape) * dtype.itemsize, os.fstat(stream.fileno()).st_size - stream.tell()
        if wanted != have or any(size > LARGEST_DIMENSION for size in shape):
            raise expected.refusal(path, f"the shape {list(shape)!s:.80} takes {wanted:,} bytes; received {have:,}")
        array = _array(stream, dtype, shape[::-1] if in_columns else shape, stream.tell())
        return array.transpose() if in_columns else array


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, in_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, in_columns, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version[0]}.{version[1]}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"the shape {list(shape)!s:.80}")
    return shape, in_columns, dtype
