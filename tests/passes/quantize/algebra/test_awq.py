"""AWQ: gains on outliers, never loses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization_fixtures import GROUP, mean_gram, outlier

from stepfold.loop.errors import UsageError
from stepfold.passes.quantize.algebra.awq import Protected, awq
from stepfold.passes.quantize.algebra.errors import drift, output_error
from stepfold.passes.quantize.algebra.grids import NVFP4, Grid, IntegerGrid

INT4 = IntegerGrid(4, GROUP)


def effective(result: Protected) -> torch.Tensor:
    """[N, M] the weight that `x / scale` and the rounded weight amount to."""
    return result.quantized.weight / result.scale


@pytest.mark.parametrize("grid", [INT4, NVFP4], ids=str)
def test_outlier_fixture(grid: Grid) -> None:
    layer = outlier()
    outputs, magnitude, gram = layer.test @ layer.weight.T, layer.train.abs().mean(0), mean_gram(layer.train)

    def error(weight: torch.Tensor) -> float:
        return drift(layer.test @ weight.T, outputs)

    nearest = error(grid.nearest(layer.weight))
    plain, clipped = (awq(layer.weight, magnitude, gram, grid, clip) for clip in (False, True))
    assert 0 < plain.ratio < 1
    assert error(effective(plain)) <= 0.65 * nearest  # measured 0.35 on int4
    assert clipped.ratio == plain.ratio and error(effective(clipped)) < error(effective(plain))
    assert clipped.error < plain.error < plain.baseline == clipped.baseline


def inputs(seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    scales = torch.exp(spread * torch.randn(16, generator=generator, dtype=torch.float64))
    return torch.randn(4, 16, generator=generator, dtype=torch.float64), x * scales


@given(st.integers(0, 1000), st.floats(0, 3), st.booleans(), st.sampled_from([2, 4]))
def test_never_worse_than_nearest(seed: int, spread: float, clip: bool, bits: int) -> None:
    weight, x = inputs(seed, spread)
    grid = IntegerGrid(bits, 8)
    result = awq(weight, x.abs().mean(0), mean_gram(x), grid, clip)
    baseline = output_error(grid.nearest(weight) - weight, mean_gram(x))
    assert result.baseline == pytest.approx(baseline)
    assert result.error <= result.baseline
    assert result.error == pytest.approx(output_error(effective(result) - weight, mean_gram(x)))


def test_nothing_to_protect() -> None:
    """Equal magnitudes give the same scale for every ratio; the first, which scales nothing, is kept."""
    weight, x = inputs(0, 1.0)
    result = awq(weight, torch.ones(16), mean_gram(x), IntegerGrid(4, 8))
    assert result.ratio == 0 and result.error == result.baseline
    assert torch.equal(result.scale, torch.ones(16, dtype=torch.float64))


def test_a_channel_that_is_never_active() -> None:
    weight, x = inputs(0, 1.0)
    x[:, 3] = 0
    result = awq(weight, x.abs().mean(0), mean_gram(x), IntegerGrid(4, 8))
    assert torch.isfinite(effective(result)).all() and (result.scale > 0).all()


def test_a_gram_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match=r"qkv: expected a Gram of shape \(16, 16\); received \(3, 3\)"):
        awq(torch.ones(4, 16), torch.ones(16), torch.eye(3), IntegerGrid(4, 8), site="qkv")
