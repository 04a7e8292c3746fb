"""Narrower ranges: never worse by the error they are chosen by, and better where a range has outliers."""

import pytest
import torch
from quantization_fixtures import GROUP, mean_gram, outlier

from stepfold.passes.quantize.algebra.clipping import POWER, clipped_scales
from stepfold.passes.quantize.algebra.errors import drift, group_errors
from stepfold.passes.quantize.algebra.grids import FP8_TENSOR, INT8_CHANNEL, MXFP4, NVFP4, Grid, IntegerGrid, grouped

GRIDS: list[Grid] = [
    IntegerGrid(4, 16),
    IntegerGrid(2, 16, symmetric=False),
    IntegerGrid(4, "tensor"),
    INT8_CHANNEL,
    FP8_TENSOR,
    NVFP4,
    MXFP4,
]


def heavy(rows: int = 6) -> torch.Tensor:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return weight**3


def gram() -> torch.Tensor:
    return mean_gram(torch.randn(200, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cumsum(1))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_no_group_is_worse_by_the_norm(grid: Grid, rows: int) -> None:
    weight = heavy(rows)

    def errors(rounded: torch.Tensor) -> torch.Tensor:
        return grouped(rounded - weight, grid.group).abs().pow(POWER).sum(-1)

    scales = clipped_scales(weight, grid)
    assert scales.scale.shape == grid.scales(weight).scale.shape
    clipped = errors(grid.round(weight, scales))
    assert (clipped <= errors(grid.nearest(weight)) * (1 + 1e-12)).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_no_group_is_worse_by_its_outputs(grid: Grid, rows: int) -> None:
    weight = heavy(rows)
    scales = clipped_scales(weight, grid, gram())
    assert scales.scale.shape == grid.scales(weight).scale.shape

    def errors(rounded: torch.Tensor) -> torch.Tensor:
        found = group_errors(rounded - weight, gram(), scales.group)
        return found.sum() if grid.group == "tensor" else found

    assert (errors(grid.round(weight, scales)) <= errors(grid.nearest(weight)) * (1 + 1e-12)).all()


def test_the_best_part_of_the_range_is_found() -> None:
    """Of fifteen 1 and one 14 in 2 bits, 10.5 covers most of both: |14 - 10.5| outweighs the ones, but only so far."""
    weight = torch.tensor([[1.0] * 15 + [14.0]])
    grid = IntegerGrid(2, 16)
    received = clipped_scales(weight, grid, lowest=0.5, steps=4).scale.item()
    errors = {p: float((grid.round(weight, grid.scales(weight, p)) - weight).abs().pow(POWER).sum()) for p in PARTS}
    assert received == pytest.approx(14 * min(PARTS, key=errors.__getitem__))


PARTS = (1.0, 0.875, 0.75, 0.625, 0.5)


def test_a_range_without_outliers_stays_whole() -> None:
    weight = torch.tensor([[7.0, -7.0, 3.0, 1.0]])
    assert clipped_scales(weight, IntegerGrid(4, 4)).scale.item() == 1.0


def test_outlier_fixture_gets_better() -> None:
    layer, grid = outlier(), IntegerGrid(4, GROUP)
    outputs = layer.test @ layer.weight.T

    def error(rounded: torch.Tensor) -> float:
        return drift(layer.test @ rounded.T, outputs)

    plain = error(grid.nearest(layer.weight))
    by_norm = error(grid.round(layer.weight, clipped_scales(layer.weight, grid)))
    by_output = error(grid.round(layer.weight, clipped_scales(layer.weight, grid, mean_gram(layer.train))))
    assert by_output < by_norm < plain
    assert by_output < 0.5 * plain  # measured 0.35
