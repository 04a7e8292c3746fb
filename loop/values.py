"""Values that a file gives: numbers in their range, arrays that are arrays, and nothing that JSON does not have."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, prod
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field

MOST_VALUES = 1 << 28  # of one tensor of one sample: 1 GiB in float32
LARGEST_FACTOR = 1e6  # of scales; products with it stay far from the largest float32
MOST_DIMENSIONS = 16
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
TIMESTEP_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32")
"""Those that hold every timestep of a grid of 1,000."""


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    if prod(shape) > MOST_VALUES:
        raise ValueError(f"expected at most {MOST_VALUES:,} values in a sample")
    return shape


def _plain(value: Any) -> Any:
    """Raise ValueError unless a value is made of what JSON has, with finite numbers."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if not isinstance(name, str):
                raise ValueError(f"expected text as a key; received {name!r:.40}")  # noqa: TRY004 (pydantic's way)
            _plain(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _plain(entry)
    elif isinstance(value, float) and not isfinite(value):
        raise ValueError(f"expected finite numbers; received {value}")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise ValueError(f"expected text, numbers, lists or mappings; received {type(value).__name__}")
    return value


def array_of(value: Any) -> np.ndarray:
    """A number, or nested lists of numbers, as an array.

    Raises:
        ValueError: it is something else, is ragged or empty, or has numbers that are not finite or too large.
    """
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError("expected lists of the same length") from None
    if array.dtype.kind not in "iufb" or array.size == 0:
        raise ValueError(f"expected numbers; received {value!r:.60}")
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers; received {value!r:.60}")
    return array


def _array_like(value: Any) -> Any:
    array_of(value)
    return value


def _not_zero(value: float) -> float:
    if value == 0:
        raise ValueError("expected a number other than 0")
    return value


Size = Annotated[int, Field(strict=True, gt=0, le=1 << 40)]
Shape = Annotated[tuple[Size, ...], Field(max_length=MOST_DIMENSIONS), AfterValidator(_bounded)]
"""Sizes of one sample, without the batch."""
Scale = Annotated[float, Field(strict=True, ge=-LARGEST_FACTOR, le=LARGEST_FACTOR, allow_inf_nan=False)]
Factor = Annotated[Scale, AfterValidator(_not_zero)]
Plain = Annotated[Any, AfterValidator(_plain)]
"""What JSON has, with finite numbers."""
ArrayLike = Annotated[Any, AfterValidator(_array_like)]
"""A number, or nested lists of numbers."""
