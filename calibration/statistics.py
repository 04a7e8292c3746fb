"""Streaming statistics of one value that linear layers read.

Counts are integers, low and high are float32, sums are float64, so merging is associative: exactly for the first two,
up to the rounding of a float64 addition for the sums. Statistics of the card "calibration collector": range, mean,
mean magnitude and second moment of each channel, the Gram matrix, and a few raw rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

Array = np.ndarray

CHUNK = 1 << 20
"""Elements that are reduced at once, so that temporary copies stay small whatever the size of a value."""


class NotFiniteError(ValueError):
    """A value holds NaN or infinity; the message says which."""


@dataclass
class Statistics:
    """Accumulators of one value [..., M].

    Attributes:
        count: [buckets, branches] rows seen.
        low: [buckets, branches, M] smallest value; +inf where nothing was seen.
        high: [buckets, branches, M] largest value; -inf where nothing was seen.
        total: [buckets, branches, M] sum of x.
        magnitude: [buckets, branches, M] sum of |x|.
        square: [buckets, branches, M] sum of x^2.
        gram: [M, M] sum of x x^T over sampled rows of all buckets and branches, or None for a wide value.
        gram_count: [1] rows in the Gram matrix.
        rows: [capacity, M] raw rows.
        rows_at: [capacity, 2] the bucket and the branch of each raw row.
        kept: raw rows so far.
    """

    count: Array
    low: Array
    high: Array
    total: Array
    magnitude: Array
    square: Array
    gram: Array | None
    gram_count: Array
    rows: Array
    rows_at: Array
    kept: int = 0

    @classmethod
    def empty(cls, buckets: int, branches: int, width: int, *, gram: bool = True, capacity: int = 0) -> Statistics:
        """Nothing seen yet of a value of `width` channels.

        Room for `capacity` raw rows is taken at once: small arrays that stay would scatter over the memory that
        activations come and go in, which then grows.
        """
        cells, channels = (buckets, branches), (buckets, branches, width)
        return cls(
            count=np.zeros(cells, np.int64),
            low=np.full(channels, np.inf, np.float32),
            high=np.full(channels, -np.inf, np.float32),
            total=np.zeros(channels),
            magnitude=np.zeros(channels),
            square=np.zeros(channels),
            gram=np.zeros((width, width)) if gram else None,
            gram_count=np.zeros(1, np.int64),
            rows=np.empty((capacity, width), np.float32),
            rows_at=np.empty((capacity, 2), np.int64),
        )

    def observe(self, values: torch.Tensor, bucket: int, branch: int) -> None:
        """Take rows [T, M] into everything but the Gram matrix and the raw rows.

        Raises:
            NotFiniteError: they hold NaN or infinity.
        """
        at = (bucket, branch)
        for rows in values.split(max(1, CHUNK // values.shape[1])):
            low, high = rows.amin(dim=0), rows.amax(dim=0)
            if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
                raise NotFiniteError("NaN" if bool(torch.isnan(low).any() | torch.isnan(high).any()) else "infinity")
            self.count[at] += len(rows)
            np.minimum(self.low[at], low.numpy(), out=self.low[at])
            np.maximum(self.high[at], high.numpy(), out=self.high[at])
            self.total[at] += rows.sum(dim=0, dtype=torch.float64).numpy()
            self.magnitude[at] += rows.abs().sum(dim=0, dtype=torch.float64).numpy()
            self.square[at] += rows.square().sum(dim=0, dtype=torch.float64).numpy()

    def observe_gram(self, values: torch.Tensor) -> None:
        """Add x x^T of rows [T, M]; products are float32, their sum is float64."""
        assert self.gram is not None
        np.add(self.gram, (values.T @ values).numpy(), out=self.gram)
        self.gram_count += len(values)

    def keep(self, values: torch.Tensor, bucket: int, branch: int) -> None:
        """Keep raw rows [rows, M]."""
        stop = self.kept + len(values)
        self.rows[self.kept : stop] = values.numpy()
        self.rows_at[self.kept : stop] = (bucket, branch)
        self.kept = stop

    def arrays(self) -> dict[str, Array]:
        """The accumulators by name."""
        named = {name: getattr(self, name) for name in ("count", *SUMS, "low", "high", "gram_count")}
        if self.gram is not None:
            named["gram"] = self.gram
        return named | {"rows": self.rows[: self.kept], "rows_at": self.rows_at[: self.kept]}


SUMS = ("total", "magnitude", "square")
ACCUMULATORS = ("count", *SUMS, "low", "high", "gram_count", "gram", "rows", "rows_at")
"""Names in `Statistics.arrays`."""


def combine(name: str, first: Array, second: Array) -> Array:
    """One accumulator of two disjoint sets of samples, the earlier first.

    Args:
        name: name of the accumulator, as in `Statistics.arrays`.
        first: its value over the earlier samples.
        second: its value over the later samples.
    """
    if name == "low":
        return np.minimum(first, second)
    if name == "high":
        return np.maximum(first, second)
    if name in ("rows", "rows_at"):
        return np.concatenate([first, second])
    return first + second


def merge(first: Mapping[str, Array], second: Mapping[str, Array]) -> dict[str, Array]:
    """The accumulators of two disjoint sets of samples, the earlier first."""
    return {name: combine(name, array, second[name]) for name, array in first.items()}
