"""Criteria and compensation on a feed-forward layer whose errors are known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from quantization_fixtures import ffn256

from stepfold.passes.prune import compensate
from stepfold.passes.prune.compensate import Layer, least_squares, lost, with_mean, without
from stepfold.passes.prune.criteria import CRITERIA
from stepfold.passes.prune.moments import Moments

HIDDEN = 1024
SHARES = (0.75, 0.5, 0.25)
NONE = {
    "magnitude": (0.215, 0.387, 0.604),
    "wanda": (0.163, 0.317, 0.527),
    "fluctuation": (0.164, 0.317, 0.530),
}
"""Relative output errors by the share that is kept, nothing compensated: measured once on this fixture."""
LEAST_SQUARES = {
    "magnitude": (0.111, 0.219, 0.381),
    "wanda": (0.101, 0.201, 0.353),
    "fluctuation": (0.100, 0.198, 0.351),
}
SEEDS = 0.1
"""How much other draws move the errors, relative."""


@dataclass(frozen=True, eq=False)
class Second:
    """The layer behind the activation, and what it reads: to fit with, and to test with."""

    layer: Layer
    moments: Moments
    test: torch.Tensor

    def error(self, changed: Layer) -> float:
        """Relative error of the outputs of the whole layer."""
        wanted, found = (outputs(layer, self.test) for layer in (self.layer, changed))
        return float((found - wanted).norm() / wanted.norm())


def outputs(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    return rows @ layer.weight.T + (0 if layer.bias is None else layer.bias)


@cache
def second() -> Second:
    fixture = ffn256()
    pair = fixture.pair
    train, test = (pair.activation(x @ pair.first.T + pair.first_bias) for x in (fixture.train, fixture.test))
    return Second(Layer(pair.second, pair.second_bias), Moments.of_rows(train), test)


def kept(criterion: str, share: float) -> torch.Tensor:
    scores = CRITERIA[criterion].scores(second().layer.weight, second().moments)
    best = torch.argsort(scores, descending=True)[: round(share * HIDDEN)]
    return torch.zeros(HIDDEN, dtype=torch.bool).index_fill(0, best, True)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_errors_are_those_measured_before(criterion: str) -> None:
    data = second()
    for share, none, squares in zip(SHARES, NONE[criterion], LEAST_SQUARES[criterion], strict=True):
        mask = kept(criterion, share)
        assert data.error(without(data.layer, mask)) == pytest.approx(none, rel=SEEDS)
        assert data.error(least_squares(data.layer, mask, data.moments)) == pytest.approx(squares, rel=SEEDS)


def test_gates_of_compensation() -> None:
    """Magnitude, half of the channels: least squares at most 0.65 of none, the mean alone below none."""
    data, mask = second(), kept("magnitude", 0.5)
    none = data.error(without(data.layer, mask))
    assert data.error(least_squares(data.layer, mask, data.moments)) <= 0.65 * none
    assert data.error(with_mean(data.layer, mask, data.moments)) < none


def test_all_kept_is_the_layer_itself() -> None:
    data = second()
    assert least_squares(data.layer, torch.ones(HIDDEN, dtype=torch.bool), data.moments) is data.layer


def test_least_squares_is_the_update_of_the_optimal_brain_surgeon(monkeypatch: pytest.MonkeyPatch) -> None:
    """W - W_P [(H^-1)_PP]^-1 (H^-1)_P: for the covariance H, without damping."""
    monkeypatch.setattr(compensate, "DAMPING", 0.0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 24, generator=generator, dtype=torch.float64) @ torch.randn(
        24, 24, generator=generator, dtype=torch.float64
    )
    layer = Layer(torch.randn(5, 24, generator=generator, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    moments, mask = Moments.of_rows(rows), torch.arange(24) % 3 > 0
    inverse = torch.linalg.inv(compensate.covariance(layer, moments))
    gone = ~mask
    update = layer.weight[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone]
    torch.testing.assert_close(least_squares(layer, mask, moments).weight, layer.weight - update, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("biased", [True, False])
def test_the_gram_matrix_knows_the_error(biased: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(300, 8, generator=generator, dtype=torch.float64) + 1
    bias = torch.randn(4, generator=generator, dtype=torch.float64) if biased else None
    layer = Layer(torch.randn(4, 8, generator=generator, dtype=torch.float64), bias)
    moments, mask = Moments.of_rows(rows), torch.arange(8) < 6
    for changed in (without(layer, mask), with_mean(layer, mask, moments), least_squares(layer, mask, moments)):
        measured = (outputs(layer, rows) - outputs(changed, rows)).square().sum(dim=1).mean()
        assert lost(layer, changed, moments) == pytest.approx(float(measured), rel=1e-9)


def test_a_layer_without_bias_is_fitted_to_the_gram_matrix() -> None:
    rows = torch.ones(50, 3, dtype=torch.float64)  # all channels alike: the kept one can stand for the others
    layer = Layer(torch.ones(1, 3, dtype=torch.float64), None)
    fitted = least_squares(layer, torch.tensor([True, False, False]), Moments.of_rows(rows))
    assert fitted.bias is None and fitted.weight[0].tolist() == [pytest.approx(3, rel=1e-2), 0, 0]
