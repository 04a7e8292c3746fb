"""Where to evaluate: warped grids and random moves away from them."""

from __future__ import annotations

import numpy as np

Positions = tuple[int, ...]

WARPS = tuple((a, b) for a in (1.0, 1.2, 1.4, 1.7) for b in (0.55, 0.7, 0.85, 1.0, 1.5))
"""Exponents (a, b) of the distribution function `1 - (1 - u^a)^b` (Kumaraswamy) that spreads the positions.

a above 1 and b below 1 put more of them at the start, where a trajectory bends; (1, 1) is even.
"""


def warped(calls: int, evaluations: int, a: float, b: float) -> Positions:
    """`evaluations` distinct calls from 0, spread over `calls` by a Kumaraswamy distribution function."""
    u = np.arange(evaluations) / evaluations
    return distinct(np.round(calls * (1 - (1 - u**a) ** b)).astype(int), calls)


def distinct(positions: np.ndarray, calls: int) -> Positions:
    """The nearest ascending distinct calls below `calls` that begin with 0."""
    result = [0]
    for i, position in enumerate(positions[1:], start=1):
        highest = calls - (len(positions) - i)
        result.append(int(min(max(position, result[-1] + 1), highest)))
    return tuple(result)


def moved(positions: Positions, calls: int, generator: np.random.Generator) -> Positions:
    """Positions with one of them, or one and all after it, moved by up to half the gap after it at random."""
    i = int(generator.integers(1, len(positions)))
    gap = (*positions, calls)[i + 1] - positions[i]
    step = int(generator.integers(1, max(2, gap // 2) + 1) * generator.choice([-1, 1]))
    stop = i + 1 if generator.random() < 0.5 else len(positions)
    shifted = np.asarray(positions)
    shifted[i:stop] += step
    return distinct(shifted, calls)


def without_one(positions: Positions) -> list[Positions]:
    """The positions with each one but the first left out in turn."""
    return [positions[:i] + positions[i + 1 :] for i in range(1, len(positions))]
