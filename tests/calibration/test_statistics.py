"""Streaming statistics: what they are, and that merging them does not depend on the order of grouping."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepfold.calibration import statistics
from stepfold.calibration.statistics import NotFiniteError, Statistics, merge

Array = np.ndarray
WIDTH = 3
EXACT = ("count", "low", "high", "gram_count", "rows", "rows_at")
SUMS = ("total", "magnitude", "square", "gram")
ROUNDING = 1e-12
"""Relative rounding of a few float64 additions."""


def taken(rows: Array, bucket: int = 0, branch: int = 0) -> Statistics:
    """The statistics of rows in one bucket of two and one branch of two; the first row is kept."""
    found = Statistics.empty(2, 2, WIDTH, capacity=4)
    values = torch.from_numpy(rows)
    found.observe(values, bucket, branch)
    found.observe_gram(values)
    found.keep(values[:1], bucket, branch)
    return found


finite = st.floats(-1e6, 1e6, width=32)
batches = st.lists(st.lists(finite, min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=5)
cells = st.tuples(batches, st.integers(0, 1), st.integers(0, 1))


def arrays_of(cell: tuple[Sequence[Sequence[float]], int, int]) -> dict[str, Array]:
    rows, bucket, branch = cell
    return taken(np.array(rows, np.float32), bucket, branch).arrays()


@given(cells, cells, cells)
def test_merging_is_associative(first, second, third) -> None:
    a, b, c = (arrays_of(cell) for cell in (first, second, third))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert left.keys() == right.keys() == {*EXACT, *SUMS}
    for name in EXACT:
        np.testing.assert_array_equal(left[name], right[name])
    for name in SUMS:
        largest = max(np.abs(part[name]).max() for part in (a, b, c))
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=ROUNDING * max(1, largest))


@given(cells)
def test_nothing_is_neutral(cell) -> None:
    arrays, nothing = arrays_of(cell), Statistics.empty(2, 2, WIDTH).arrays()
    for merged in (merge(arrays, nothing), merge(nothing, arrays)):
        for name, array in arrays.items():
            np.testing.assert_array_equal(merged[name], array)


def test_what_they_are() -> None:
    rows = np.random.default_rng(0).standard_normal((40, WIDTH)).astype(np.float32)
    found = taken(rows, 1, 0).arrays()
    wide = rows.astype(np.float64)
    expected = {
        "count": 40,
        "low": rows.min(0),
        "high": rows.max(0),
        "total": wide.sum(0),
        "magnitude": np.abs(wide).sum(0),
        "square": (wide**2).sum(0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][1, 0], value, rtol=1e-6, atol=1e-6)  # squares are rounded to float32
    np.testing.assert_allclose(found["gram"], wide.T @ wide, rtol=1e-5, atol=1e-5)  # a float32 product
    assert found["gram_count"].tolist() == [40]
    np.testing.assert_array_equal(found["rows"], rows[:1])
    assert found["rows_at"].tolist() == [[1, 0]]
    assert {name: found[name].dtype for name in ("low", "total", "gram")} == {
        "low": np.float32,
        "total": np.float64,
        "gram": np.float64,
    }


def test_other_cells_stay_empty() -> None:
    found = taken(np.ones((2, WIDTH), np.float32), 1, 0).arrays()
    assert found["count"].tolist() == [[0, 0], [2, 0]]
    assert np.isposinf(found["low"][0, 0]).all() and np.isneginf(found["high"][0, 0]).all()
    assert not found["total"][:, 1].any()


def test_large_values_are_reduced_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).standard_normal((50, WIDTH)).astype(np.float32)
    whole = taken(rows).arrays()
    monkeypatch.setattr(statistics, "CHUNK", 7 * WIDTH)
    for name, array in taken(rows).arrays().items():
        np.testing.assert_allclose(array, whole[name], rtol=ROUNDING)


def test_a_wide_value_has_no_gram_matrix() -> None:
    found = Statistics.empty(1, 1, WIDTH, gram=False)
    assert "gram" not in found.arrays() and found.arrays()["gram_count"].tolist() == [0]


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_what_is_not_finite_is_refused(value: float, what: str) -> None:
    rows = np.zeros((3, WIDTH), np.float32)
    rows[1, 2] = value
    with pytest.raises(NotFiniteError, match=f"^{what}$"):
        taken(rows)


def test_nan_wins_over_infinity() -> None:
    with pytest.raises(NotFiniteError, match=r"^NaN$"):
        taken(np.array([[np.inf, np.nan, 0]], np.float32))


def test_sums_are_float64() -> None:
    """2^24 + 1 is no float32: adding ones to it one at a time would lose them."""
    found = Statistics.empty(1, 1, 1)
    for value in [2.0**24, *[1.0] * 5]:
        found.observe(torch.tensor([[value]]), 0, 0)
    assert found.total.item() == 2.0**24 + 5
