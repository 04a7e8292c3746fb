"""Scales over timesteps: the rule, and the drift it is for."""

import math

import pytest
import torch

from stepfold.ir import operators  # noqa: F401  (registers the stepfold:: operators)
from stepfold.loop.errors import UsageError
from stepfold.passes.quantize.algebra.buckets import ActivationPlan, plan_activations
from stepfold.passes.quantize.algebra.errors import drift
from stepfold.passes.quantize.algebra.int8 import activation_range

BUCKETS = 8


def plan(low: list[float], high: list[float], dynamic: bool = False) -> ActivationPlan:
    return plan_activations(torch.tensor(low), torch.tensor(high), dynamic)


# -- the rule


def test_steady_ranges_are_static() -> None:
    received = plan([-1.0, -1.5, -0.5], [0.5, 1.0, 1.0])
    assert received == ActivationPlan("static", 1.5, ((-1.5, 1.0),))


def test_a_spread_above_the_limit() -> None:
    low, high = [-1.0, -1.0, -1.0], [0.5, 1.0, 1.6]
    bucketed = plan(low, high)
    assert bucketed.kind == "bucketed" and bucketed.spread == pytest.approx(1.6)
    assert bucketed.ranges == tuple(zip(low, torch.tensor(high).tolist(), strict=True))
    assert plan(low, high, dynamic=True) == ActivationPlan("dynamic", bucketed.spread, ())


def test_ranges_include_zero() -> None:
    assert plan([1.0, 1.2], [2.0, 2.2]).ranges == ((0.0, pytest.approx(2.2)),)


def test_nothing_was_seen() -> None:
    assert plan([0.0, 0.0], [0.0, 0.0]) == ActivationPlan("static", 1.0, ((0.0, 0.0),))


def test_a_spike_over_silence() -> None:
    received = plan([0.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    assert received.kind == "bucketed" and received.spread == math.inf


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([], [], r"expected one low and one high for each bucket; received shapes \(0,\) and \(0,\)"),
        ([0.0], [1.0, 2.0], r"received shapes \(1,\) and \(2,\)"),
        ([float("nan")], [1.0], r"expected finite low <= high in each bucket"),
        ([2.0], [1.0], r"expected finite low <= high in each bucket"),
    ],
)
def test_ranges_that_are_none(low: list[float], high: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=f"ranges: .*{message}"):
        plan(low, high)


# -- the drift it is for


def tokens(bucket: int, seed: int) -> torch.Tensor:
    """[T, M] inputs whose size goes from 1 to 8 over the buckets."""
    generator = torch.Generator().manual_seed(100 * seed + bucket)
    return 8.0 ** (bucket / (BUCKETS - 1)) * torch.randn(512, 64, generator=generator)


def errors(ranges: list[tuple[float, float]]) -> torch.Tensor:
    """[buckets] output error with 8-bit activations under one static range for each bucket."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for bucket, bounds in enumerate(ranges):
        x, (scale, zero) = tokens(bucket, seed=1), activation_range(*bounds)
        q = torch.ops.stepfold.quantize_static(x, scale, zero)
        found.append(drift(((q.float() - zero.float()) * scale) @ weight.T, x @ weight.T))
    return torch.tensor(found)


def bounds(x: torch.Tensor) -> tuple[float, float]:
    return float(x.amin()), float(x.amax())


def test_drifting_ranges() -> None:
    """The plan finds the drift; its ranges do nearly as well as run-time ones, one range for all does not."""
    seen = [bounds(tokens(bucket, seed=2)) for bucket in range(BUCKETS)]
    low, high = (list(side) for side in zip(*seen, strict=True))
    received = plan(low, high)
    assert received.kind == "bucketed" and received.spread > 2
    dynamic = errors([bounds(tokens(bucket, seed=1)) for bucket in range(BUCKETS)])
    bucketed = errors(list(received.ranges))
    static = errors([(min(low), max(high))] * BUCKETS)
    assert bucketed.mean() <= 1.2 * dynamic.mean()
    assert static.mean() >= 2 * dynamic.mean()
    assert dynamic.mean() < 0.015  # measured 0.011
    assert bucketed.amax() <= 2 * bucketed.mean() and static.amax() > 2 * static.mean()
