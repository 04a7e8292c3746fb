"""Output errors of a changed weight, from the second moments of what it reads."""

from __future__ import annotations

import torch

from ....loop.errors import UsageError


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """`tr(D G D^T)`: the mean squared output, summed over channels, of a weight difference.

    Args:
        difference: D [N, M].
        gram: G [M, M], mean of x x^T over the inputs.
    """
    return float(((difference @ gram) * difference).sum())


def relative_error(approximation: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """Relative L2 error of the outputs of an approximation [N, M] of a weight [N, M]."""
    square = output_error(approximation - weight, gram) / output_error(weight, gram)
    return max(square, 0.0) ** 0.5


def drift(approximation: torch.Tensor, outputs: torch.Tensor) -> float:
    """Relative L2 error of values of any shape."""
    return float((approximation - outputs).norm() / outputs.norm())


def group_errors(difference: torch.Tensor, gram: torch.Tensor, group: int) -> torch.Tensor:
    """[N, M / group]: the output error of each run of `group` input channels on its own."""
    N, M = difference.shape
    runs = difference.reshape(N, M // group, group)
    blocks = torch.stack([gram[i : i + group, i : i + group] for i in range(0, M, group)])
    return (torch.einsum("ngi,gij->ngj", runs, blocks) * runs).sum(dim=-1)


def expect_gram(weight: torch.Tensor, gram: torch.Tensor, site: str) -> None:
    """Raise UsageError unless a Gram fits a weight [N, M] and is finite."""
    M = weight.shape[1]
    if tuple(gram.shape) != (M, M):
        raise UsageError(
            f"{site}: expected a Gram of shape ({M}, {M}); received {tuple(gram.shape)}. Collect it again."
        )
    if not torch.isfinite(gram).all():
        raise UsageError(f"{site}: expected a finite Gram; received NaN or infinity. Check the calibration inputs.")
