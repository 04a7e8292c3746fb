"""Smoothing: exact before rounding, better after it, and PTQ4DiT's weights of timesteps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization_fixtures import GROUP, Layer, outlier
from scipy.stats import spearmanr

from stepfold.loop.errors import UsageError
from stepfold.passes.quantize.algebra.errors import drift
from stepfold.passes.quantize.algebra.grids import INT8_CHANNEL, IntegerGrid
from stepfold.passes.quantize.algebra.smoothing import (
    LARGEST_RATIO,
    balanced_scale,
    exponent_scale,
    rank_correlation,
    search_smoothing,
    smoothquant,
    smoothquant_candidates,
    svdquant_candidates,
    timestep_weights,
    weighted_salience,
)

INT8_TENSOR = IntegerGrid(8, "tensor")
INT4 = IntegerGrid(4, GROUP)
ALPHAS = (0.3, 0.5, 0.7, 0.8)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return outlier()


def largest(layer: Layer) -> torch.Tensor:
    return layer.train.abs().amax(0)


def static_int8(layer: Layer, scale: torch.Tensor) -> float:
    """Held-out error with 8-bit weights and 8-bit activations under one scale that was calibrated before."""
    known = INT8_TENSOR.scales(layer.train / scale)
    rounded = INT8_TENSOR.round(layer.test / scale, known)
    return drift(rounded @ INT8_CHANNEL.nearest(layer.weight * scale).T, layer.test @ layer.weight.T)


def dynamic_int4(layer: Layer, scale: torch.Tensor) -> float:
    rounded = INT4.nearest(layer.test / scale) @ INT4.nearest(layer.weight * scale).T
    return drift(rounded, layer.test @ layer.weight.T)


# -- SmoothQuant


def test_exact_before_rounding(layer: Layer) -> None:
    for alpha, beta in svdquant_candidates(4):
        scale = exponent_scale(largest(layer), layer.weight, alpha, beta)
        change = (layer.test / scale) @ (layer.weight * scale).T - layer.test @ layer.weight.T
        assert change.abs().max() <= 1e-9


def test_int8_static(layer: Layer) -> None:
    none = static_int8(layer, torch.ones(512))
    errors = {a: static_int8(layer, exponent_scale(largest(layer), layer.weight, a, 1 - a)) for a in ALPHAS}
    assert 0.07 < none < 0.16  # the fixture is the one the gate was set on: 0.106
    assert errors[0.5] <= 0.30 * none  # measured 0.15
    assert errors[0.3] > errors[0.5] > errors[0.7]


def test_search_on_int8(layer: Layer) -> None:
    tokens = layer.train[:1024]
    found = smoothquant(layer.weight, tokens, INT8_CHANNEL, INT8_TENSOR)
    assert found.beta == pytest.approx(1 - found.alpha) and 0.4 < found.alpha < 0.9
    by_half = exponent_scale(largest(layer), layer.weight, 0.5, 0.5)
    assert static_int8(layer, found.scale) <= static_int8(layer, by_half)


def test_search_on_int4(layer: Layer) -> None:
    none = dynamic_int4(layer, torch.ones(512))
    found = smoothquant(layer.weight, layer.train[:1024], INT4, INT4, svdquant_candidates())
    assert dynamic_int4(layer, found.scale) <= 0.60 * none  # measured 0.40


def test_weights_alone_can_be_smoothed(layer: Layer) -> None:
    found = smoothquant(layer.weight, layer.train[:256], INT4, None, smoothquant_candidates(5))
    assert found.error < drift(INT4.nearest(layer.weight) @ layer.train[:256].T, layer.weight @ layer.train[:256].T)


def test_search_takes_the_best_and_first() -> None:
    weight = torch.ones(2, 4)
    errors = iter([3.0, 1.0, 2.0, 1.0])
    found = search_smoothing(
        torch.arange(1.0, 5), weight, lambda scale: next(errors), [(a / 10, 0.0) for a in range(4)]
    )
    assert (found.alpha, found.beta, found.error) == (0.1, 0.0, 1.0)
    assert torch.equal(found.scale, exponent_scale(torch.arange(1.0, 5), weight, 0.1, 0.0))


def test_no_candidates() -> None:
    with pytest.raises(UsageError, match=r"candidates: expected at least one pair of exponents; received none"):
        search_smoothing(torch.ones(4), torch.ones(2, 4), lambda scale: 0.0, [])


def test_candidates() -> None:
    assert smoothquant_candidates(2) == [(0.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert svdquant_candidates(4) == [(0, 0), (0.25, 0), (0.5, 0), (0.75, 0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
    assert len(svdquant_candidates()) == 39


def test_scale_by_hand() -> None:
    """a / w = 4, 1 and 1/4 to the power 1/2 have geometric mean 1; the fourth channel is never active."""
    activation, weight = (
        torch.tensor([4.0, 1.0, 0.5, 0.0]),
        torch.tensor([[1.0, 1.0, 2.0, 3.0], [0.5, -1.0, -1.0, 0.0]]),
    )
    assert exponent_scale(activation, weight, 0.5, 0.5).tolist() == pytest.approx([2.0, 1.0, 0.5, 1.0])
    assert exponent_scale(activation, weight, 0.0, 0.0).tolist() == [1.0] * 4
    assert exponent_scale(torch.zeros(4), weight, 0.5, 0.5).tolist() == [1.0] * 4


def test_scale_is_bounded() -> None:
    received = exponent_scale(torch.tensor([1e-9, 1e9]), torch.ones(1, 2), 1.0, 0.0)
    assert received.tolist() == pytest.approx([1 / LARGEST_RATIO, LARGEST_RATIO])


# -- PTQ4DiT

VECTORS = st.lists(st.integers(0, 9), min_size=3, max_size=12)


@given(st.data())
def test_rank_correlation_is_that_of_scipy(data: st.DataObject) -> None:
    first = data.draw(VECTORS)
    second = data.draw(st.lists(st.integers(0, 9), min_size=len(first), max_size=len(first)))
    received = rank_correlation(torch.tensor(first, dtype=torch.float32), torch.tensor(second, dtype=torch.float32))
    constant = len(set(first)) == 1 or len(set(second)) == 1
    wanted = 0.0 if constant else float(np.asarray(spearmanr(first, second))[0])
    assert received == pytest.approx(wanted, abs=1e-12)


def test_timesteps_that_disagree_with_the_weight_count_more() -> None:
    """rho = 1, 0 and -1: exp(-1), 1 and e over their sum."""
    weight = torch.tensor([[1.0, 2.0, -3.0], [0.5, 1.0, 0.0]])
    salience = torch.tensor([[10.0, 20.0, 30.0], [2.0, 2.0, 2.0], [9.0, 4.0, 1.0]])
    total = np.exp(-1) + 1 + np.e
    weights = timestep_weights(salience, weight)
    assert weights.tolist() == pytest.approx([np.exp(-1) / total, 1 / total, np.e / total])
    mean = sum(float(w) * row for w, row in zip(weights, salience, strict=True))
    torch.testing.assert_close(weighted_salience(salience, weight), mean)


def test_balanced_scale_gives_both_sides_the_same_salience() -> None:
    generator = torch.Generator().manual_seed(0)
    salience = torch.rand(5, 16, generator=generator) + 0.1
    weight = torch.randn(8, 16, generator=generator)
    scale = balanced_scale(salience, weight)
    ratio = (weighted_salience(salience, weight) / scale) / (weight * scale).abs().amax(0)
    torch.testing.assert_close(ratio, ratio[:1].expand(16))
