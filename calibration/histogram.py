"""A histogram whose bins are known before any value is seen, so that merging is exact addition.

A bin is the sign, the exponent and the first four mantissa bits of a float32: 16 bins an octave, each about 5 % wide,
for magnitudes from 2^-40 to 2^24. The first bin of each sign also holds what is smaller, the last what is larger.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

PER_OCTAVE = 16
LOWEST, OCTAVES = -40, 64  # exponents of two
HALF = PER_OCTAVE * OCTAVES
BINS = 2 * HALF
"""First the bins of positive values from small to large, then those of negative values from small to large."""

_MANTISSA_BITS, _KEPT_BITS, _BIAS = 23, 4, 127
_RAW = 1 << (32 - _MANTISSA_BITS + _KEPT_BITS)  # sign, exponent and the kept bits of the mantissa
_FIRST = (_BIAS + LOWEST) * PER_OCTAVE  # the raw bin of 2^LOWEST


def histogram(values: Array) -> Array:
    """How many values fall into each bin: int64 [BINS].

    Args:
        values: any shape, float32, finite.
    """
    raw = values.ravel().view(np.int32) >> (_MANTISSA_BITS - _KEPT_BITS)  # negative values come out negative
    counts = np.bincount(raw + _RAW // 2, minlength=_RAW)
    negative, positive = counts[: _RAW // 2], counts[_RAW // 2 :]
    return np.concatenate([_fold(positive), _fold(negative)])


def edges() -> Array:
    """The magnitudes at which the bins of one sign begin: [HALF + 1], the last is where they end."""
    steps = np.arange(HALF + 1)
    return np.exp2(LOWEST + steps // PER_OCTAVE) * (1 + (steps % PER_OCTAVE) / PER_OCTAVE)


def magnitude_quantile(counts: Array, fraction: float) -> float:
    """The end of the bin up to which this fraction of the magnitudes lies; 0 without any value.

    Args:
        counts: [BINS].
        fraction: from 0 to 1.
    """
    both = np.cumsum(counts[:HALF] + counts[HALF:])
    if both[-1] == 0:
        return 0.0
    return float(edges()[1 + int(np.searchsorted(both, fraction * both[-1]))])


def _fold(counts: Array) -> Array:
    """The counts of all exponents, those outside of the range added to its ends: [HALF]."""
    folded = counts[_FIRST : _FIRST + HALF].copy()
    folded[0] += counts[:_FIRST].sum()
    folded[-1] += counts[_FIRST + HALF :].sum()
    return folded
