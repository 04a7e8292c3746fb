"""The histogram with bins that are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepfold.calibration.histogram import BINS, HALF, edges, histogram, magnitude_quantile

magnitudes = st.floats(2.0**-40, 2.0**24, width=32, exclude_max=True)


def bins_of(*values: float) -> list[int]:
    return np.flatnonzero(histogram(np.array(values, np.float32))).tolist()


@given(magnitudes)
def test_a_value_lies_between_the_edges_of_its_bin(value: float) -> None:
    (positive,) = bins_of(value)
    assert edges()[positive] <= value < edges()[positive + 1]
    assert bins_of(-value) == [positive + HALF]


def test_bins_are_a_sixteenth_of_an_octave() -> None:
    width = edges()[1:] / edges()[:-1]
    assert len(edges()) == HALF + 1 and 2 * HALF == BINS == 2048
    assert width.max() == pytest.approx(17 / 16) and width.min() == pytest.approx(32 / 31)
    assert edges()[40 * 16] == 1.0 and edges()[41 * 16] == 2.0


@pytest.mark.parametrize(
    ("value", "found"),
    [(0.0, 0), (-0.0, HALF), (2.0**-60, 0), (-(2.0**-130), HALF), (2.0**40, HALF - 1), (-3e38, BINS - 1)],
)
def test_what_lies_outside_counts_at_the_ends(value: float, found: int) -> None:
    assert bins_of(value) == [found]


def test_every_value_counts_once() -> None:
    values = np.random.default_rng(0).standard_normal((7, 3, 11)).astype(np.float32)
    counts = histogram(values)
    assert counts.dtype == np.int64 and counts.sum() == values.size
    assert counts[HALF:].sum() == (values < 0).sum()


def test_merging_is_addition() -> None:
    values = np.random.default_rng(1).standard_normal(100).astype(np.float32) * np.float32(1e3)
    np.testing.assert_array_equal(histogram(values), histogram(values[:37]) + histogram(values[37:]))


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.999])
def test_a_quantile_ends_the_bin_it_lies_in(fraction: float) -> None:
    values = np.random.default_rng(2).standard_normal(10_000).astype(np.float32)
    exact = np.quantile(np.abs(values), fraction)
    assert exact <= magnitude_quantile(histogram(values), fraction) <= exact * 1.07


def test_a_quantile_of_nothing_is_zero() -> None:
    assert magnitude_quantile(np.zeros(BINS, np.int64), 0.5) == 0.0
