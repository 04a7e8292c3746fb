"""Output errors from second moments equal those from the outputs themselves."""

import pytest
import torch
from quantization_fixtures import mean_gram

from stepfold.loop.errors import UsageError
from stepfold.passes.quantize.algebra.errors import (
    drift,
    expect_gram,
    group_errors,
    output_error,
    relative_error,
)


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [T, M], weight [N, M] and an approximation of it."""
    generator = torch.Generator().manual_seed(0)
    x, weight, noise = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (40, 5, 5))
    return x, weight, weight + 0.1 * noise


def test_output_error(layer: tuple[torch.Tensor, ...]) -> None:
    x, weight, near = layer
    outputs = x @ (near - weight).T
    assert output_error(near - weight, mean_gram(x)) == pytest.approx(float(outputs.square().sum() / 40))


def test_relative_error(layer: tuple[torch.Tensor, ...]) -> None:
    x, weight, near = layer
    assert relative_error(near, weight, mean_gram(x)) == pytest.approx(drift(x @ near.T, x @ weight.T))
    assert relative_error(weight, weight, mean_gram(x)) == 0


def test_group_errors(layer: tuple[torch.Tensor, ...]) -> None:
    x, weight, near = layer
    received = group_errors(near - weight, mean_gram(x), 4)
    for g in range(3):
        part = slice(4 * g, 4 * g + 4)
        outputs = x[:, part] @ (near - weight)[:, part].T
        torch.testing.assert_close(received[:, g], outputs.square().mean(dim=0))


def test_a_gram_that_does_not_fit() -> None:
    weight = torch.zeros(2, 3)
    with pytest.raises(UsageError, match=r"fc1: expected a Gram of shape \(3, 3\); received \(2, 2\)"):
        expect_gram(weight, torch.eye(2), "fc1")
    with pytest.raises(UsageError, match=r"fc1: expected a finite Gram; received NaN or infinity"):
        expect_gram(weight, torch.full((3, 3), float("inf")), "fc1")
