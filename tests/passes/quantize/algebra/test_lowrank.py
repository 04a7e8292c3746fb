"""Factorizations: the exact one is the best, the randomized one nearly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization_fixtures import outlier

from stepfold.passes.quantize.algebra.errors import drift
from stepfold.passes.quantize.algebra.lowrank import sketched, truncated


def draw(N: int, M: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_shapes_and_error(N: int, M: int, data: st.DataObject) -> None:
    """The squared error is the sum of the squared singular values that are left out (Eckart and Young)."""
    rank = data.draw(st.integers(0, min(N, M)))
    matrix = draw(N, M)
    up, down = truncated(matrix, rank)
    assert up.shape == (N, rank) and down.shape == (rank, M)
    left_out = torch.linalg.svdvals(matrix)[rank:].square().sum()
    torch.testing.assert_close((matrix - up @ down).square().sum(), left_out)
    sketch = sketched(matrix, rank, torch.Generator().manual_seed(1))
    assert sketch[0].shape == up.shape and sketch[1].shape == down.shape


@pytest.mark.parametrize("transposed", [True, False])
def test_sketch_is_exact_on_low_rank(transposed: bool) -> None:
    matrix = draw(60, 5) @ draw(5, 40, 1)
    matrix = matrix.T if transposed else matrix
    up, down = sketched(matrix, 5, torch.Generator().manual_seed(0))
    assert drift(up @ down, matrix) < 1e-12


def test_sketch_is_nearly_the_best() -> None:
    weight = outlier().weight
    best, near = truncated(weight, 32), sketched(weight, 32, torch.Generator().manual_seed(0))
    assert drift(near[0] @ near[1], weight) <= 1.02 * drift(best[0] @ best[1], weight)


def test_sketch_follows_its_seed() -> None:
    first, second, other = (sketched(draw(20, 20), 2, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_dtype_is_kept() -> None:
    up, down = truncated(draw(4, 6).float(), 2)
    assert up.dtype == down.dtype == torch.float32
