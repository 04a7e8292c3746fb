"""Turn what a caller passes (arrays, torch tensors, lists, numbers) into exactly the array a port takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..loop.errors import UsageError
from ..loop.ports import InputPort, Port

Array = np.ndarray


def to_array(name: str, value: Any) -> Array:
    """An array of what the caller passed; a torch tensor is recognized by its methods, torch is not imported.

    Raises:
        UsageError: it is no array of numbers.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu().numpy()
        array = np.asarray(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{name}: expected an array of numbers; received {type(value).__name__}: {error}") from None
    if array.dtype.kind not in "biuf":
        raise UsageError(
            f"{name}: expected an array of numbers; received {type(value).__name__} of dtype {array.dtype}."
        )
    return array


def for_port(port: Port, value: Any) -> Array:
    """The array a port takes, of any batch size.

    A conversion that keeps every value is made (int32 to int64, float16 to float32, Python numbers); others are
    refused.

    Raises:
        UsageError: another dtype, rank or fixed size than the port's, or a value that is not a number.
    """
    array = _as_dtype(port, to_array(port.name, value), typed=hasattr(value, "dtype"))
    sizes = zip(port.shape, array.shape, strict=False)
    if array.ndim != len(port.shape) or any(size is not None and size != got for size, got in sizes):
        raise UsageError(f"{port.name}: expected shape {port.shape_text}; received {list(array.shape)}.")
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise UsageError(f"{port.name}: expected numbers; received NaN in {int(np.isnan(array).sum())} places.")
    return array


def for_input(port: InputPort, value: Any) -> Array:
    """As `for_port`; an index outside the range of the input is refused too."""
    array = for_port(port.port, value)
    if port.cardinality is not None:
        outside = (array < 0) | (array >= port.cardinality)
        if outside.any():
            raise UsageError(
                f"{port.name}: expected indices from 0 to {port.cardinality - 1}; received "
                f"{int(array[outside][0])} at position {int(np.argwhere(outside)[0][0])}."
            )
    return array


def _as_dtype(port: Port, array: Array, typed: bool) -> Array:
    """The same values in the dtype of the port; numbers without a dtype of their own (`typed` False) fit any float."""
    target = np.dtype(port.dtype)
    kinds = (array.dtype.kind, target.kind)
    if array.dtype == target:
        return array
    if kinds[0] in "iu" and kinds[1] in "iu":
        if array.size and not (np.iinfo(target).min <= int(array.min()) and int(array.max()) <= np.iinfo(target).max):
            raise UsageError(
                f"{port.name}: expected values that fit {target}; received {array.dtype} up to {array.max()}."
            )
        return array.astype(target)
    if (kinds == ("f", "f") and np.can_cast(array.dtype, target, "safe")) or (not typed and kinds in _LITERAL):
        return array.astype(target)
    raise UsageError(
        f"{port.name}: expected dtype {target}; received {array.dtype}. Convert it: .astype({str(target)!r})"
    )


_LITERAL = {("f", "f"), ("i", "f")}  # Python numbers become floats of any width
