"""SVDQuant: each part gains, the whole is exact without rounding."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization_fixtures import GROUP, Layer, mean_gram, outlier

from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.passes.quantize.algebra.errors import drift
from stepfold.passes.quantize.algebra.gptq import gptq
from stepfold.passes.quantize.algebra.grids import FP8_CHANNEL, FP8_TENSOR, NVFP4, Grid, IntegerGrid, Scales
from stepfold.passes.quantize.algebra.lowrank import truncated
from stepfold.passes.quantize.algebra.svdquant import LowRankSplit, SvdquantSettings, svdquant

INT4 = IntegerGrid(4, GROUP)
TOKENS = 1024


@dataclass(frozen=True)
class Identity(Grid):
    """Every number is on the grid."""

    group: str = "row"

    def scales(self, weight: torch.Tensor, shrink: float = 1.0) -> Scales:
        return Scales(weight.new_ones(weight.shape[0], 1), weight.shape[1])

    def encode_at(self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        return values

    def decode_at(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        return codes

    def bits_per_weight(self, rows: int, columns: int) -> float:
        return 64


@pytest.fixture(scope="module")
def layer() -> Layer:
    return outlier()


@pytest.fixture(scope="module")
def narrow(layer: Layer) -> Layer:
    """A corner of it, for what holds whatever the weights are."""
    return Layer(layer.weight[:128, :128], layer.train[:, :128], layer.test[:, :128])


def split(layer: Layer, gram: bool = False, activation: Grid | None = INT4, **settings: object) -> LowRankSplit:
    chosen = SvdquantSettings(
        **{"weight_grid": INT4, "activation_grid": activation, "steps": 10, "iterations": 8, **settings}
    )  # type: ignore[arg-type]
    moments = mean_gram(layer.train) if gram else None
    return svdquant(layer.weight, layer.train[:TOKENS], chosen, layer.train.abs().amax(0), moments)


def held_out(layer: Layer, found: LowRankSplit, activation: Grid | None = INT4) -> float:
    return drift(found.apply(layer.test, activation), layer.test @ layer.weight.T)


# -- what it gains


@pytest.mark.slow
def test_each_part_gains_in_4_bits(layer: Layer) -> None:
    outputs = layer.test @ layer.weight.T
    nearest = drift(INT4.nearest(layer.test) @ INT4.nearest(layer.weight).T, outputs)
    parts = {
        "smoothing": split(layer, rank=0, iterations=0),
        "branch": split(layer, iterations=0),
        "iterations": split(layer),
        "compensation": split(layer, gram=True),
    }
    errors = {name: held_out(layer, found) for name, found in parts.items()}
    assert 0.15 < nearest < 0.25  # the fixture is the one the gates were set on: 0.220
    assert errors["smoothing"] <= 0.60 * nearest  # measured 0.40
    assert errors["branch"] <= 0.30 * nearest  # measured 0.16
    assert errors["branch"] <= 0.60 * errors["smoothing"]
    assert errors["compensation"] < errors["iterations"] < errors["branch"]
    clipped = split(layer, gram=True, clip=True)
    assert held_out(layer, clipped) < errors["compensation"]


@pytest.mark.parametrize("activation", [IntegerGrid(8), IntegerGrid(8, "tensor")], ids=["row", "tensor"])
def test_8_bit_activations(layer: Layer, activation: Grid) -> None:
    nearest = drift(activation.nearest(layer.test) @ INT4.nearest(layer.weight).T, layer.test @ layer.weight.T)
    found = split(layer, gram=True, activation=activation)
    assert held_out(layer, found, activation) <= 0.30 * nearest
    assert found.smoothing.alpha > 0


def test_another_grid(layer: Layer) -> None:
    nearest = drift(NVFP4.nearest(layer.test) @ NVFP4.nearest(layer.weight).T, layer.test @ layer.weight.T)
    found = split(layer, activation=NVFP4, weight_grid=NVFP4, iterations=1)
    assert found.residual.grid == NVFP4 and held_out(layer, found, NVFP4) <= 0.5 * nearest


@pytest.mark.slow
def test_an_fp8_residual_beats_plain_fp8(layer: Layer) -> None:
    """The branch takes the outliers of the weight, smoothing those of the activations: 0.0365 becomes 0.0054."""
    plain = drift(FP8_TENSOR.nearest(layer.test) @ FP8_CHANNEL.nearest(layer.weight).T, layer.test @ layer.weight.T)
    found = split(layer, weight_grid=FP8_CHANNEL, activation=FP8_TENSOR)
    compensated = split(layer, gram=True, clip=True, weight_grid=FP8_CHANNEL, activation=FP8_TENSOR)
    assert found.residual.grid == FP8_CHANNEL
    assert held_out(layer, found, FP8_TENSOR) < 0.25 * plain
    assert held_out(layer, compensated, FP8_TENSOR) < held_out(layer, found, FP8_TENSOR)


def test_weights_alone_gain_with_the_rank(layer: Layer) -> None:
    errors = []
    for rank in (0, 16, 32, 64):
        up, down = truncated(layer.weight, rank)
        approximation = INT4.nearest(layer.weight - up @ down) + up @ down
        errors.append(drift(layer.test @ approximation.T, layer.test @ layer.weight.T))
    assert errors == sorted(errors, reverse=True)
    assert errors == pytest.approx([0.124, 0.095, 0.085, 0.074], rel=0.1)
    assert split(layer, activation=None, iterations=0).error < errors[2]


# -- what it computes


@pytest.mark.parametrize("iterations", [0, 2])
def test_without_rounding_it_is_the_layer(narrow: Layer, iterations: int) -> None:
    found = split(narrow, activation=None, weight_grid=Identity(), iterations=iterations, steps=3)
    assert held_out(narrow, found, None) < 1e-6
    assert drift(found.weight, narrow.weight) < 1e-6
    assert found.up.shape == (128, 32) and found.down.shape == (32, 128)


def test_float32(narrow: Layer) -> None:
    single = Layer(narrow.weight.float(), narrow.train.float(), narrow.test.float())
    found = split(single, activation=None, weight_grid=Identity(), steps=3)
    assert held_out(single, found, None) < 1e-6 and found.up.dtype == torch.float32


def test_more_iterations_are_never_worse(narrow: Layer) -> None:
    errors = [split(narrow, iterations=count, steps=2).error for count in (0, 1, 3, 10)]
    assert errors == sorted(errors, reverse=True)


@given(st.integers(0, 1000))
def test_iterations_that_do_not_help_are_dropped(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, tokens = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (8, 32))
    grid = IntegerGrid(2, 8)
    once, often = (svdquant(weight, tokens, SvdquantSettings(grid, None, 2, 1, n)).error for n in (0, 30))
    assert often <= once


def test_compensation_is_for_what_the_residual_reads(narrow: Layer) -> None:
    """GPTQ gets the Gram of the smoothed input."""
    found = split(narrow, gram=True, iterations=1, steps=3)
    assert found.smoothing.alpha > 0
    scale = found.smoothing.scale
    residual = narrow.weight * scale - found.up @ found.down
    wanted = gptq(residual, mean_gram(narrow.train / scale), INT4).quantized
    assert (wanted.codes == found.residual.codes).double().mean() > 0.999


def test_error_is_that_of_the_split(narrow: Layer) -> None:
    tokens = narrow.train[:TOKENS]
    found = split(narrow, iterations=1, steps=2)
    assert found.error == pytest.approx(drift(found.apply(tokens, INT4), tokens @ narrow.weight.T))
    unrounded = drift(found.apply(tokens, None), tokens @ found.weight.T)
    assert unrounded < 1e-12


def test_stacked_weights_share_one_down_projection(narrow: Layer) -> None:
    """q, k and v are rows of one weight: each takes its rows of up and of the residual."""
    found = split(narrow, iterations=0, steps=2)
    for rows in (slice(0, 32), slice(32, 128)):
        part = found.residual.weight[rows] + found.up[rows] @ found.down
        torch.testing.assert_close(part / found.smoothing.scale, found.weight[rows])


def test_it_follows_its_seed(narrow: Layer) -> None:
    first, second = (split(narrow, gram=True, iterations=2, steps=3) for _ in range(2))
    assert first.error == second.error and torch.equal(first.residual.codes, second.residual.codes)


def test_compensation_is_dropped_where_it_does_not_help() -> None:
    """A Gram of other inputs than the tokens: rounding to nearest is better on the tokens and stays."""
    generator = torch.Generator().manual_seed(0)
    weight, tokens = (torch.randn(n, 32, generator=generator, dtype=torch.float64) for n in (16, 64))
    misleading = mean_gram(torch.randn(8, 1, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 9, 32))
    settings = SvdquantSettings(IntegerGrid(4, 8), rank=2, steps=2)
    plain, kept = svdquant(weight, tokens, settings), svdquant(weight, tokens, settings, gram=misleading)
    assert kept.error == plain.error and torch.equal(kept.residual.codes, plain.residual.codes)


# -- what it refuses

WEIGHT, INPUTS = torch.ones(8, 16), torch.ones(4, 16)


@pytest.mark.parametrize("rank", [9, -1])
def test_rank(rank: int) -> None:
    with pytest.raises(UsageError, match=rf"fc1: rank: expected 0 to 8 = min\(N, M\); received {rank}\. Lower it"):
        svdquant(WEIGHT, INPUTS, SvdquantSettings(IntegerGrid(4), rank=rank), site="fc1")


def test_clip_needs_a_gram() -> None:
    with pytest.raises(UsageError, match=r"fc1: clip: expected a Gram to judge ranges with; received none"):
        svdquant(WEIGHT, INPUTS, SvdquantSettings(IntegerGrid(4), rank=1, clip=True), site="fc1")


def test_grams() -> None:
    settings = SvdquantSettings(IntegerGrid(4), rank=1, steps=2)
    with pytest.raises(UsageError, match=r"fc1: expected a Gram of shape \(16, 16\); received \(2, 2\)"):
        svdquant(WEIGHT, INPUTS, settings, gram=torch.eye(2), site="fc1")
    with pytest.raises(StepfoldError, match=r"fc1: Gram not positive definite"):
        svdquant(WEIGHT, INPUTS, settings, gram=torch.eye(16) - 9 * torch.ones(16, 16), site="fc1")
