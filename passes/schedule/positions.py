"""Where to evaluate: warped grids and their neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Positions = tuple[int, ...]

WARPS = tuple((a, b) for a in (0.7, 1.0, 1.4) for b in (0.7, 1.0, 1.5, 2.2))
"""Exponents (a, b) of the distribution function `1 - (1 - u^a)^b` (Kumaraswamy) that spreads the positions."""


def warped(calls: int, evaluations: int, a: float, b: float) -> Positions:
    """`evaluations` distinct calls from 0, spread over `calls` by a Kumaraswamy distribution function."""
    u = np.arange(evaluations) / evaluations
    return distinct(np.round(calls * (1 - (1 - u**a) ** b)).astype(int), calls)


def distinct(positions: np.ndarray, calls: int) -> Positions:
    """The nearest ascending distinct calls that begin with 0."""
    result = [0]
    for i, position in enumerate(positions[1:], start=1):
        highest = calls - (len(positions) - i)
        result.append(int(min(max(position, result[-1] + 1), highest)))
    return tuple(result)


def neighbours(positions: Positions, calls: int, distance: int) -> Iterator[Positions]:
    """Every set of positions that differs by moving one of them, or it and all behind it, by `distance`."""
    for i in range(1, len(positions)):
        for move in (-distance, distance):
            for stop in (i + 1, len(positions)):
                moved = [p + move if i <= j < stop else p for j, p in enumerate(positions)]
                ascending = all(a < b for a, b in zip(moved, moved[1:], strict=False))
                if ascending and moved[-1] < calls:
                    yield tuple(moved)
