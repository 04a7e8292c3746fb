"""Scales that move the difficulty of quantization from activations into weights: `x / s` and `W diag(s)`.

SmoothQuant (Xiao et al., arXiv 2211.10438) with the exponents searched on the output error as in deepcompressor, and
the salience of PTQ4DiT (Wu et al., arXiv 2405.16005), which weighs timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ....loop.errors import UsageError
from .errors import drift
from .grids import Grid

SMALLEST = 1e-12
LARGEST_RATIO = 1e4

Exponents = tuple[float, float]
"""alpha of the activations and beta of the weights."""


@dataclass(frozen=True, eq=False)
class Smoothing:
    """A scale found by search.

    Attributes:
        alpha: exponent of the activations.
        beta: exponent of the weights.
        scale: [M], 1 where a channel is never used.
        error: relative output error on the tokens searched with.
    """

    alpha: float
    beta: float
    scale: torch.Tensor
    error: float


def exponent_scale(activation: torch.Tensor, weight: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """`a**alpha / w**beta`, with geometric mean 1.

    Args:
        activation: a [M], largest magnitude (or salience) of each channel.
        weight: [N, M] the stacked weights of every layer that reads it; w is the largest magnitude of each column.
        alpha: how much of the activations' difficulty moves into the weights.
        beta: how much of the weights' own difficulty is taken back.

    Returns:
        [M], at most `LARGEST_RATIO` from 1; 1 where a channel is never used.
    """
    largest = weight.abs().amax(dim=0)
    used = (activation > 0) & (largest > 0)
    ratio = activation.clamp(min=SMALLEST) ** alpha / largest.clamp(min=SMALLEST) ** beta
    ratio = torch.where(used, ratio, torch.ones_like(ratio))
    centred = ratio / ratio[used].log().mean().exp() if used.any() else ratio
    return torch.where(used, centred.clamp(1 / LARGEST_RATIO, LARGEST_RATIO), torch.ones_like(ratio))


def smoothquant_candidates(steps: int = 20) -> list[Exponents]:
    """(alpha, 1 - alpha) for alpha = 0, 1 / steps ... 1, and (0, 0), which leaves everything as it is."""
    return [(0.0, 0.0), *((i / steps, (steps - i) / steps) for i in range(steps + 1))]


def svdquant_candidates(steps: int = 20) -> list[Exponents]:
    """(0, 0), (alpha, 0) and (alpha, 1 - alpha) for alpha = 1 / steps ... 1 - 1 / steps (deepcompressor)."""
    inner = range(1, steps)
    return [(0.0, 0.0), *((i / steps, 0.0) for i in inner), *((i / steps, (steps - i) / steps) for i in inner)]


def search_smoothing(
    activation: torch.Tensor,
    weight: torch.Tensor,
    error: Callable[[torch.Tensor], float],
    candidates: Iterable[Exponents],
) -> Smoothing:
    """The candidate of least error, the earliest of equals.

    Args:
        activation: [M] largest magnitude of each channel.
        weight: [N, M] the stacked weights of every layer that reads it.
        error: error that a scale [M] leaves.
        candidates: exponents to try.
    """
    found: Smoothing | None = None
    for alpha, beta in candidates:
        scale = exponent_scale(activation, weight, alpha, beta)
        received = error(scale)
        if found is None or received < found.error:
            found = Smoothing(alpha, beta, scale, received)
    if found is None:
        raise UsageError("candidates: expected at least one pair of exponents; received none. Give (0, 0).")
    return found


def smoothquant(
    weight: torch.Tensor,
    tokens: torch.Tensor,
    weight_grid: Grid,
    activation_grid: Grid | None,
    candidates: Iterable[Exponents] | None = None,
) -> Smoothing:
    """Search the exponent of SmoothQuant on the output error of one layer, both sides quantized.

    Args:
        weight: [N, M] the stacked weights of every layer that reads the tokens.
        tokens: [T, M] a sample of the inputs.
        weight_grid: what weights are rounded to.
        activation_grid: what activations are rounded to, by the ranges of `tokens`; None leaves them.
        candidates: `smoothquant_candidates()` by default.
    """
    outputs = tokens @ weight.T

    def error(scale: torch.Tensor) -> float:
        inputs = tokens / scale
        rounded = inputs if activation_grid is None else activation_grid.nearest(inputs)
        return drift(rounded @ weight_grid.nearest(weight * scale).T, outputs)

    chosen = smoothquant_candidates() if candidates is None else candidates
    return search_smoothing(tokens.abs().amax(dim=0), weight, error, chosen)


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's correlation of two vectors [M]; ties get the mean of their ranks, a constant vector gives 0."""
    a, b = (_ranks(vector) - (vector.numel() + 1) / 2 for vector in (first, second))
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else 0.0


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """[M] float64 ranks from 1."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).to(torch.float64)
    return (last - (count - 1) / 2)[place]


def timestep_weights(salience: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How much each timestep counts: more where its salient channels are not those of the weight.

    `softmax(-rho(salience_t, max |W|))` (PTQ4DiT, Spearman's rho-guided salience calibration).

    Args:
        salience: [S, M] largest magnitude of each channel at each timestep or bucket.
        weight: [N, M] the stacked weights that read it.

    Returns:
        [S] float64, positive, sum 1.
    """
    largest = weight.abs().amax(dim=0)
    rho = torch.tensor([rank_correlation(row, largest) for row in salience], dtype=torch.float64)
    return torch.softmax(-rho, dim=0)


def weighted_salience(salience: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[M] mean of the salience [S, M] over timesteps, weighed by `timestep_weights`."""
    return (timestep_weights(salience, weight).to(salience.dtype)[:, None] * salience).sum(dim=0)


def balanced_scale(salience: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """PTQ4DiT's smoothing scale [M]: `sqrt(weighted salience / max |W|)`, with geometric mean 1.

    Both sides then have the salience `sqrt(a w)` in every channel.

    Args:
        salience: [S, M] largest magnitude of each channel at each timestep or bucket.
        weight: [N, M] the stacked weights that read it.
    """
    return exponent_scale(weighted_salience(salience, weight), weight, 0.5, 0.5)
