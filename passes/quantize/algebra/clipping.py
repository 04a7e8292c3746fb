"""Clip search: cover less of the range of each group so that the rest is rounded finer."""

from __future__ import annotations

import torch

from .errors import group_errors
from .grids import Grid, Scales, grouped

POWER = 2.4
"""Exponent of the error that the GPTQ reference implementation minimizes (IST-DASLab/gptq, `Quantizer.find_params`)."""


def clipped_scales(
    weight: torch.Tensor, grid: Grid, gram: torch.Tensor | None = None, lowest: float = 0.5, steps: int = 20
) -> Scales:
    """The scales of each group whose error is smallest over shrunken ranges.

    The error is `sum |w - round(w)|**2.4`, or with a Gram the output error that each group makes on its own (AWQ,
    llm-awq `auto_clip`).

    Args:
        weight: [N, M].
        grid: what to round to.
        gram: [M, M] mean of x x^T over the inputs.
        lowest: smallest part of the range that is tried.
        steps: how many parts below the whole are tried.

    Returns:
        Scales whose error is nowhere larger than that of the whole range.
    """
    best = grid.scales(weight)
    least = _errors(weight, grid, best, gram)
    for step in range(1, steps + 1):
        tried = grid.scales(weight, 1 - (1 - lowest) * step / steps)
        error = _errors(weight, grid, tried, gram)
        better = error < least
        least = torch.where(better, error, least)
        best = best.better_of(tried, better)
    return best


def _errors(weight: torch.Tensor, grid: Grid, scales: Scales, gram: torch.Tensor | None) -> torch.Tensor:
    """The error of every scale, of the scale's shape."""
    difference = grid.round(weight, scales) - weight
    if gram is None:
        return grouped(difference, grid.group).abs().pow(POWER).sum(dim=-1)
    errors = group_errors(difference, gram, scales.group)
    return errors if scales.scale.shape[0] > 1 or weight.shape[0] == 1 else errors.sum(dim=0, keepdim=True)
