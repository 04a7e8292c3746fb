"""GPTQ: its identity, its gain over rounding to nearest, and what it refuses."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from quantization_fixtures import GROUP, Layer, mean_gram, outlier

from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.passes.quantize.algebra.clipping import clipped_scales
from stepfold.passes.quantize.algebra.errors import drift, output_error
from stepfold.passes.quantize.algebra.gptq import DAMPING, Compensated, gptq
from stepfold.passes.quantize.algebra.grids import INT8_CHANNEL, MXFP4, NVFP4, Grid, IntegerGrid

INT4 = IntegerGrid(4, GROUP)
GRIDS = [INT4, IntegerGrid(3, GROUP), IntegerGrid(4, GROUP, symmetric=False), INT8_CHANNEL, NVFP4, MXFP4]


@pytest.fixture(scope="module")
def layer() -> Layer:
    return outlier()


@pytest.fixture(scope="module")
def gram(layer: Layer) -> torch.Tensor:
    return mean_gram(layer.train)


@pytest.fixture(scope="module")
def compensated(layer: Layer, gram: torch.Tensor) -> Callable[[Grid, bool], Compensated]:
    """GPTQ on the fixture, once for each grid and order of columns."""
    return cache(lambda grid, ordered: gptq(layer.weight, gram, grid, order_by_activity=ordered))


def held_out(layer: Layer, weight: torch.Tensor) -> float:
    return drift(layer.test @ weight.T, layer.test @ layer.weight.T)


def small(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, M] and the Gram of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 32, generator=generator, dtype=torch.float64)
    mixing = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    return torch.randn(8, 32, generator=generator, dtype=torch.float64), mean_gram(x @ mixing)


# -- what it gains


def test_order_by_activity(layer: Layer, compensated: Callable[[Grid, bool], Compensated]) -> None:
    nearest = held_out(layer, INT4.nearest(layer.weight))
    ordered = held_out(layer, compensated(INT4, True).quantized.weight)
    natural = held_out(layer, compensated(INT4, False).quantized.weight)
    assert 0.10 < nearest < 0.14  # the fixture is the one the gates were set on: 0.124
    assert ordered <= 0.40 * nearest  # measured 0.34
    assert natural <= 0.65 * nearest  # measured 0.48


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_grid_gains(layer: Layer, compensated: Callable[[Grid, bool], Compensated], grid: Grid) -> None:
    """Int8 of whole rows wastes its steps on the isolated large entries too."""
    nearest = held_out(layer, grid.nearest(layer.weight))
    assert held_out(layer, compensated(grid, True).quantized.weight) <= 0.5 * nearest


def test_clipped_ranges_gain_more(
    layer: Layer, gram: torch.Tensor, compensated: Callable[[Grid, bool], Compensated]
) -> None:
    whole = compensated(INT4, True).quantized.weight
    scales = clipped_scales(layer.weight, INT4, gram)
    clipped = gptq(layer.weight, gram, INT4, scales).quantized
    assert clipped.scales is scales
    assert held_out(layer, clipped.weight) < 0.6 * held_out(layer, whole)  # measured 0.44


@pytest.mark.parametrize("ordered", [True, False])
def test_white_inputs_gain_nothing(layer: Layer, ordered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8192, 512, generator=generator, dtype=torch.float64)
    gram = mean_gram(x) + 100 * torch.eye(512)  # nothing left to learn from the sample
    received = gptq(layer.weight, gram, INT4, order_by_activity=ordered).quantized.weight
    ratio = drift(received, layer.weight) / drift(INT4.nearest(layer.weight), layer.weight)
    assert 0.95 <= ratio <= 1.05


# -- what it computes


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_identity(
    layer: Layer, gram: torch.Tensor, compensated: Callable[[Grid, bool], Compensated], grid: Grid, ordered: bool
) -> None:
    """The normalized errors square up to tr(D H D^T), across the borders of the column blocks."""
    result = compensated(grid, ordered)
    damped = gram + result.damping * gram.diagonal().mean() * torch.eye(512, dtype=torch.float64)
    wanted = output_error(result.quantized.weight - layer.weight, damped)
    assert result.damping == DAMPING
    assert result.loss == pytest.approx(wanted, rel=1e-6)


def test_scales_are_those_of_the_weight_before() -> None:
    """Static groups: nothing but the codes differs from rounding to nearest, and columns keep their places."""
    weight, gram = small()
    for grid in (IntegerGrid(4, 8), IntegerGrid(4, 8, symmetric=False)):
        quantized, plain = gptq(weight, gram, grid).quantized, grid.scales(weight)
        assert torch.equal(quantized.scales.scale, plain.scale)
        assert quantized.codes.shape == weight.shape
        scale, _ = plain.of_columns()
        assert ((quantized.weight - weight).abs() < 8 * scale).all()
    assert not torch.equal(quantized.codes, grid.encode(weight, plain))


def test_a_positive_factor_of_the_gram_changes_nothing() -> None:
    weight, gram = small()
    one, two = (gptq(weight, factor * gram, IntegerGrid(4, 8)).quantized.codes for factor in (1, 2**7))
    assert torch.equal(one, two)


def test_float32_weights_give_float32() -> None:
    weight, gram = small()
    wide, narrow = (
        gptq(w, g, IntegerGrid(4, 8)).quantized for w, g in ((weight, gram), (weight.float(), gram.float()))
    )
    assert narrow.weight.dtype == torch.float32
    assert (wide.codes == narrow.codes).double().mean() > 0.9


def test_a_dead_channel_is_rounded_to_nearest_and_disturbs_nobody() -> None:
    weight, gram = small()
    dead = torch.arange(32) == 5
    gram = gram.masked_fill(dead | dead[:, None], 0)
    grid = IntegerGrid(4, 8)
    received = gptq(weight, gram, grid).quantized.weight
    torch.testing.assert_close(received[:, 5], grid.nearest(weight)[:, 5])
    other = weight.clone()
    other[:, 5] *= 0.9
    again = gptq(other, gram, grid, grid.scales(weight)).quantized.weight
    assert torch.equal(again[:, ~dead], received[:, ~dead])


# -- what it refuses


def test_damping_grows_until_the_gram_is_positive() -> None:
    """A smallest eigenvalue of -0.05 of the mean diagonal needs 0.08: the third doubling of 0.01."""
    weight, _ = small()
    values = torch.full((32,), 32.05 / 31, dtype=torch.float64)
    values[0] = -0.05  # sum 32: the mean diagonal is 1
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    result = gptq(weight, basis * values @ basis.T, IntegerGrid(4, 8))
    assert result.damping == pytest.approx(0.08)


def test_an_indefinite_gram() -> None:
    weight, gram = small()
    indefinite = gram - 20 * gram.diagonal().mean() * torch.ones(32, 32)
    message = r"blocks\.0\.fc1: Gram not positive definite: .* received a smallest eigenvalue of -\d"
    with pytest.raises(StepfoldError, match=message) as error:
        gptq(weight, indefinite, IntegerGrid(4, 8), site="blocks.0.fc1")
    assert not isinstance(error.value, UsageError)


def test_a_gram_that_does_not_fit() -> None:
    weight, gram = small()
    with pytest.raises(UsageError, match=r"fc1: expected a Gram of shape \(32, 32\); received \(31, 31\)"):
        gptq(weight, gram[1:, 1:], IntegerGrid(4, 8), site="fc1")
    with pytest.raises(UsageError, match=r"fc1: expected a finite Gram"):
        gptq(weight, gram * float("nan"), IntegerGrid(4, 8), site="fc1")
    with pytest.raises(UsageError, match=r"group: expected a divisor of the 32 input features; received 5\. Try 4"):
        gptq(weight, gram, IntegerGrid(4, 5))
