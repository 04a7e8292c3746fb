"""Repair without data: it generalizes to real inputs, and is dropped where it does not help."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_fixtures import DTYPE, FeedForward, ffn256, gelu

from stepfold.loop.errors import UsageError
from stepfold.passes.quantize.algebra.data_free import Pair, compensate, synthetic_inputs
from stepfold.passes.quantize.algebra.errors import drift
from stepfold.passes.quantize.algebra.grids import IntegerGrid

PLAIN = torch.zeros(1, 256, dtype=DTYPE)
"""A norm without modulation."""


@pytest.fixture(scope="module")
def layer() -> FeedForward:
    return ffn256()


@pytest.fixture(scope="module")
def synthetic() -> tuple[torch.Tensor, torch.Tensor]:
    return synthetic_inputs(8192, PLAIN, PLAIN, seed=1), synthetic_inputs(4096, PLAIN, PLAIN, seed=2)


def held_out(layer: FeedForward, pair: Pair) -> float:
    return drift(pair.outputs(layer.test), layer.pair.outputs(layer.test))


def without_units(pair: Pair, kept: torch.Tensor) -> Pair:
    """The pair with only the hidden units at the indices `kept`."""
    return replace(pair, first=pair.first[kept], first_bias=pair.first_bias[kept], second=pair.second[:, kept])


def halved(layer: FeedForward) -> Pair:
    return without_units(layer.pair, layer.pair.second.norm(dim=0).topk(512).indices)


# -- compensation of removed units


@pytest.mark.slow
def test_half_of_the_units(layer: FeedForward, synthetic: tuple[torch.Tensor, torch.Tensor]) -> None:
    pair = halved(layer)
    none = held_out(layer, pair)
    blind = compensate(layer.pair, pair, *synthetic)
    seeing = compensate(layer.pair, pair, layer.train[:6144], layer.train[6144:])
    assert 0.33 < none < 0.42  # the fixture is the one the gates were set on: 0.360
    assert held_out(layer, blind.pair) <= 0.75 * none  # measured 0.67
    assert held_out(layer, seeing.pair) <= 0.65 * none  # measured 0.57
    assert blind.error < blind.baseline


def test_nothing_removed_needs_nothing(layer: FeedForward, synthetic: tuple[torch.Tensor, torch.Tensor]) -> None:
    result = compensate(layer.pair, without_units(layer.pair, torch.arange(1024)), *synthetic)
    assert result.error == result.baseline == 0
    assert torch.equal(result.pair.second, layer.pair.second)


def test_a_removed_copy_costs_nothing() -> None:
    """The unit that stays takes over the weight of its copy."""
    pair = small()
    twins = [torch.cat([p, p[:1]]) for p in (pair.first, pair.first_bias)]
    doubled = replace(
        pair, first=twins[0], first_bias=twins[1], second=torch.cat([pair.second, pair.second[:, :1]], dim=1)
    )
    inputs = torch.randn(400, 8, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    result = compensate(doubled, without_units(doubled, torch.arange(12)), inputs[:300], inputs[300:])
    assert result.baseline > 0.05 and result.error < 0.01 * result.baseline
    torch.testing.assert_close(result.pair.second[:, 0], 2 * pair.second[:, 0], rtol=0.01, atol=0.01)


def test_units_that_never_act() -> None:
    pair = replace(small(), first=torch.zeros(12, 8, dtype=DTYPE))
    result = compensate(small(), pair, *torch.randn(2, 20, 8, generator=torch.Generator(), dtype=DTYPE))
    assert result.pair is pair and result.error == result.baseline


# -- compensation of rounding


@pytest.mark.slow
def test_rounding_is_compensated(layer: FeedForward, synthetic: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Least squares on all hidden values; measured 0.80 at 4 bits."""
    rounded = replace(layer.pair, first=IntegerGrid(4, 64).nearest(layer.pair.first))
    refitted = compensate(layer.pair, rounded, *synthetic)
    assert held_out(layer, refitted.pair) < 0.9 * held_out(layer, rounded)


def small(seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=DTYPE)

    return Pair(normal(12, 8), normal(12), normal(4, 12), normal(4), gelu)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from([2, 4]), st.integers(2, 40))
def test_never_worse_on_held_out(seed: int, kept: int, bits: int, count: int) -> None:
    """However few inputs there are to fit with."""
    pair, generator = small(seed), torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator, dtype=DTYPE)
    other = 2 * torch.randn(50, 8, generator=generator, dtype=DTYPE) + 1
    rounded = replace(pair, first=IntegerGrid(bits, 4).nearest(pair.first))
    pruned = without_units(pair, torch.arange(kept))
    for result in (
        compensate(pair, pruned, inputs, other),
        compensate(pair, rounded, inputs, other),
    ):
        wanted = pair.outputs(other)
        assert result.error <= result.baseline
        assert result.error == pytest.approx(drift(result.pair.outputs(other), wanted))


def test_a_repair_that_misleads_is_dropped() -> None:
    """Fitted where the damage is the opposite of what it is on held-out inputs."""
    pair = replace(small(), activation=torch.abs, first_bias=torch.zeros(12, dtype=DTYPE))
    rounded = replace(pair, first_bias=torch.full((12,), 0.5, dtype=DTYPE))
    far = torch.full((20, 8), 9.0, dtype=DTYPE) + 0.01 * torch.randn(20, 8, generator=torch.Generator(), dtype=DTYPE)
    result = compensate(pair, rounded, far, -far)
    assert result.pair is rounded and result.error == result.baseline


# -- inputs


def test_synthetic_inputs() -> None:
    """Tokens take the modulations in turn: normalized, scaled by 1 + scale, shifted."""
    scale = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=DTYPE)
    shift = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 6.0, 7.0, 8.0]], dtype=DTYPE)
    inputs = synthetic_inputs(1000, scale, shift, seed=0)
    assert inputs.shape == (1000, 4) and inputs.dtype == DTYPE
    torch.testing.assert_close(inputs[::2].square().mean(1), torch.full((500,), 4.0, dtype=DTYPE), rtol=1e-3, atol=0)
    torch.testing.assert_close(inputs[1::2].mean(1), torch.full((500,), 6.5, dtype=DTYPE))
    assert torch.equal(inputs, synthetic_inputs(1000, scale, shift, seed=0))
    assert not torch.equal(inputs, synthetic_inputs(1000, scale, shift, seed=1))


def test_modulations_of_two_shapes() -> None:
    with pytest.raises(
        UsageError, match=r"modulation: expected scale and shift of one shape \[S, D\]; received \(1, 4\)"
    ):
        synthetic_inputs(10, torch.zeros(1, 4), torch.zeros(1, 5), seed=0)
