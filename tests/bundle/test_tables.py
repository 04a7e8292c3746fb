"""Tables survive the file, and the recurrence in it folds to any scale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepfold.bundle import Probe, Tables
from stepfold.loop.plan import fold
from stepfold.loop.recurrence import Recurrence


def recurrence(S: int, seed: int) -> Recurrence:
    random = np.random.default_rng(seed)
    return Recurrence(
        random.random(S),
        random.random(S),
        random.random(S),
        np.tril(random.normal(size=(S, S))),
        float(random.random()),
    )


@given(S=st.integers(1, 6), seed=st.integers(0, 99), scales=st.lists(st.floats(-2, 9, allow_nan=False), max_size=3))
def test_round_trip(S: int, seed: int, scales: list[float]) -> None:
    sampler = recurrence(S, seed)
    values = {"time": np.random.default_rng(seed).normal(size=(S, 3)).astype(np.float32)}
    constants = {"ids.0": np.arange(6).reshape(2, 3)}
    tables = Tables(sampler, {scale: fold(sampler, scale) for scale in scales}, values, constants)
    again = Tables.from_arrays(tables.arrays())
    assert again.recurrence is not None and sorted(again.fitted) == sorted({scale for scale in scales})
    for scale in again.fitted:
        for name, array in tables.fitted[scale].arrays().items():
            np.testing.assert_array_equal(again.fitted[scale].arrays()[name], array)
    np.testing.assert_array_equal(again.recurrence.outputs, sampler.outputs)
    assert again.recurrence.initial_scale == sampler.initial_scale
    np.testing.assert_array_equal(again.values["time"], values["time"])
    np.testing.assert_array_equal(again.constants["ids.0"], constants["ids.0"])


def test_the_full_table_leaves_guidance_open() -> None:
    sampler = recurrence(3, 0)
    arrays = Tables(sampler).arrays()
    np.testing.assert_array_equal(arrays["full/conditional"], sampler.outputs)
    assert not arrays["full/unconditional"].any() and not arrays["full/guided"].any()


def test_keys_of_the_file() -> None:
    sampler = recurrence(2, 0)
    keys = set(Tables(sampler, {7.5: fold(sampler, 7.5)}, {"a.b": np.zeros((2, 1))}).arrays())
    assert {"scale=7.5/positions", "full/state", "recurrence/outputs", "values/a.b"} <= keys


def test_a_component_has_no_tables() -> None:
    assert Tables().arrays() == {} and Tables.from_arrays({}).recurrence is None


PROBE = Probe({"x": np.ones((2, 3), np.float32)}, {"y": np.full((2, 3), 2.0, np.float32)}, 1e-2, 5)


def test_probe_round_trip() -> None:
    again = Probe.from_arrays(PROBE.arrays())
    assert again.tolerance == 1e-2 and again.call == 5 and list(again.inputs) == ["x"] and list(again.outputs) == ["y"]


@pytest.mark.parametrize(
    ("received", "problem"),
    [
        ({"y": np.full((2, 3), 2.019)}, None),
        ({"y": np.full((2, 3), 2.021)}, "received drift 0.0105"),
        ({"y": np.full((2, 3), np.nan)}, "received drift nan"),
        ({"y": np.zeros((3, 2))}, "expected y of shape [2, 3]; received [3, 2]"),
        ({}, "expected y of shape [2, 3]; received None"),
    ],
)
def test_a_replay_is_compared_within_the_tolerance(received: dict[str, np.ndarray], problem: str | None) -> None:
    found = PROBE.differences(received)
    assert (found == []) if problem is None else (len(found) == 1 and problem in found[0])
