"""Recurrence: shapes are checked, and its depth is that of its updates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepfold.loop.recurrence import Recurrence


def random_recurrence(calls: int, depth: int, seed: int) -> Recurrence:
    generator = np.random.default_rng(seed)
    band = np.tril(np.ones((calls, calls))) - np.tril(np.ones((calls, calls)), -depth)
    return Recurrence(
        timesteps=np.linspace(1000.0, 10.0, calls),
        input_scale=generator.uniform(0.5, 1.0, calls),
        state=generator.uniform(0.5, 1.2, calls),
        outputs=band * generator.uniform(0.1, 1.0, (calls, calls)),
        initial_scale=3.0,
    )


@given(calls=st.integers(1, 9), depth=st.integers(1, 9))
def test_depth_counts_the_outputs_an_update_reads(calls: int, depth: int) -> None:
    recurrence = random_recurrence(calls, depth, seed=0)
    assert recurrence.calls == calls
    assert recurrence.depth == min(depth, calls)


def test_depth_spans_gaps() -> None:
    outputs = np.diag(np.ones(4))
    outputs[3, 0] = 0.5
    assert Recurrence(np.arange(4.0), np.ones(4), np.ones(4), outputs, 1.0).depth == 4


def test_update_may_not_read_the_future() -> None:
    with pytest.raises(ValueError, match="may only read outputs that exist: b must be lower triangular"):
        Recurrence(np.arange(2.0), np.ones(2), np.ones(2), np.array([[1.0, 0.1], [0.0, 1.0]]), 1.0)


@pytest.mark.parametrize(
    ("input_scale", "state", "outputs"),
    [
        (np.ones(3), np.ones(2), np.eye(2)),
        (np.ones(2), np.ones(1), np.eye(2)),
        (np.ones(2), np.ones(2), np.ones(2)),
    ],
)
def test_shapes_are_checked(input_scale: np.ndarray, state: np.ndarray, outputs: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match=r"a recurrence of 2 calls needs shapes \[S\], \[S\], \[S\], \[S, S\]; received"
    ):
        Recurrence(np.arange(2.0), input_scale, state, outputs, 1.0)
