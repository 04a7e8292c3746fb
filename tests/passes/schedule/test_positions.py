"""Where to evaluate: warped grids and random moves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepfold.passes.schedule.positions import WARPS, Positions, distinct, moved, warped, without_one

CALLS = st.integers(1, 100)
EXPONENT = st.floats(0.3, 3.0)


def valid(positions: Positions, calls: int) -> bool:
    """What a table accepts: ascending distinct calls that begin with 0."""
    return positions[0] == 0 and positions[-1] < calls and sorted(set(positions)) == list(positions)


@st.composite
def grids(draw: st.DrawFn, smallest: int = 1) -> tuple[int, int]:
    calls = draw(st.integers(smallest, 100))
    return calls, draw(st.integers(smallest, calls))


@given(grids(), EXPONENT, EXPONENT)
def test_a_warped_grid_has_the_wanted_evaluations(grid: tuple[int, int], a: float, b: float) -> None:
    calls, evaluations = grid
    positions = warped(calls, evaluations, a, b)
    assert len(positions) == evaluations and valid(positions, calls)


@given(CALLS, EXPONENT, EXPONENT)
def test_all_calls_have_one_grid(calls: int, a: float, b: float) -> None:
    assert warped(calls, calls, a, b) == tuple(range(calls))


@pytest.mark.parametrize(
    ("calls", "evaluations", "expected"),
    [(50, 5, (0, 10, 20, 30, 40)), (8, 3, (0, 3, 5)), (50, 1, (0,)), (10, 4, (0, 2, 5, 8))],
)
def test_exponents_of_one_are_even(calls: int, evaluations: int, expected: Positions) -> None:
    """round(calls k / evaluations), halves to even."""
    assert warped(calls, evaluations, 1.0, 1.0) == expected


def test_warps_differ_and_lean_where_they_say() -> None:
    """a above 1 and b below 1 put more positions at the start."""
    assert (1.0, 1.0) in WARPS and len(set(WARPS)) == len(WARPS)
    even = np.mean(warped(50, 10, 1.0, 1.0))
    assert np.mean(warped(50, 10, 1.7, 1.0)) < even
    assert np.mean(warped(50, 10, 1.0, 0.55)) < even < np.mean(warped(50, 10, 1.0, 1.5))


@given(grids(), st.data())
def test_distinct_repairs_anything(grid: tuple[int, int], data: st.DataObject) -> None:
    calls, evaluations = grid
    wild = data.draw(st.lists(st.integers(-10, 120), min_size=evaluations, max_size=evaluations))
    positions = distinct(np.asarray(wild), calls)
    assert len(positions) == evaluations and valid(positions, calls)


@given(grids(), st.data())
def test_distinct_keeps_what_is_valid(grid: tuple[int, int], data: st.DataObject) -> None:
    calls, evaluations = grid
    others = st.sets(st.integers(1, max(1, calls - 1)), min_size=evaluations - 1, max_size=evaluations - 1)
    positions = (0, *sorted(data.draw(others)))
    assert distinct(np.asarray(positions), calls) == positions


@given(grids(smallest=2), st.integers(0, 2**32))
def test_a_move_stays_valid(grid: tuple[int, int], seed: int) -> None:
    calls, evaluations = grid
    start = warped(calls, evaluations, 1.0, 1.0)
    positions = moved(start, calls, np.random.default_rng(seed))
    assert len(positions) == evaluations and valid(positions, calls)


def test_moves_reach_every_neighbour() -> None:
    """From (0, 3, 6) of 10: one position by one or two, and it with the one behind it."""
    generator = np.random.default_rng(0)
    reached = {moved((0, 3, 6), 10, generator) for _ in range(500)}
    assert {(0, 1, 6), (0, 2, 6), (0, 4, 6), (0, 5, 6), (0, 3, 4), (0, 3, 5), (0, 3, 7), (0, 3, 8)} <= reached
    assert {(0, 1, 4), (0, 2, 5), (0, 4, 7), (0, 5, 8)} <= reached


def test_moves_are_those_of_the_generator() -> None:
    first, second = ([moved((0, 5, 9), 20, np.random.default_rng(7)) for _ in range(3)] for _ in range(2))
    assert first == second and len(set(first)) == 1


def test_without_one_leaves_each_out_but_the_first() -> None:
    assert without_one((0, 3, 6)) == [(0, 6), (0, 3)]
    assert without_one((0,)) == without_one(()) == []


def test_a_wide_gap_is_crossed_in_one_move() -> None:
    """Half the gap behind a position, so that a grid of a thousand calls is searched as fast as one of fifty."""
    generator = np.random.default_rng(0)
    reached = {moved((0, 100, 500), 1000, generator)[1] - 100 for _ in range(2000)}
    assert max(reached) > 150 and min(reached) < -90
