"""SVDQuant: a branch of low rank takes what a few bits cannot hold (Li et al., arXiv 2411.05007).

`x W^T ~ Q_a(x / s) Q_w(W diag(s) - U D)^T + (x / s) (U D)^T` with U D of rank R in full precision. The smoothing s moves
outliers of x into the weight, the branch takes them out of the weight. Weights that read the same input are stacked:
they share s and D (deepcompressor).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ....loop.errors import UsageError
from .clipping import clipped_scales
from .errors import drift, expect_gram
from .gptq import gptq
from .grids import Grid, Quantized
from .lowrank import Factors, sketched, truncated
from .smoothing import Smoothing, search_smoothing, svdquant_candidates


@dataclass(frozen=True)
class SvdquantSettings:
    """What to search.

    Attributes:
        weight_grid: what the residual is rounded to.
        activation_grid: what inputs are rounded to, by the ranges of the tokens searched with; None leaves them.
        rank: R of the branch; 0 is smoothing alone.
        steps: how finely smoothing exponents are tried.
        iterations: how often branch and rounded residual are fitted to each other at most; it ends at the first
            one that does not help.
        clip: search the ranges of the residual (needs the Gram).
        seed: seed of the randomized factorizations of the search.
    """

    weight_grid: Grid
    activation_grid: Grid | None = None
    rank: int = 32
    steps: int = 20
    iterations: int = 20
    clip: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class LowRankSplit:
    """A weight [N, M] as smoothing, branch and rounded residual.

    Attributes:
        smoothing: the scale [M] that the input is divided by, and its exponents.
        up: [N, R].
        down: [R, M]; reads the smoothed input.
        residual: [N, M] on its grid; reads the smoothed, rounded input.
        error: relative output error on the tokens searched with.
    """

    smoothing: Smoothing
    up: torch.Tensor
    down: torch.Tensor
    residual: Quantized
    error: float

    @property
    def weight(self) -> torch.Tensor:
        """[N, M] the weight that all of it amounts to when inputs are not rounded."""
        return (self.residual.weight + self.up @ self.down) / self.smoothing.scale

    def apply(self, tokens: torch.Tensor, activation_grid: Grid | None) -> torch.Tensor:
        """Outputs [T, N] of inputs [T, M]."""
        inputs = tokens / self.smoothing.scale
        rounded = inputs if activation_grid is None else activation_grid.nearest(inputs)
        return rounded @ self.residual.weight.T + (inputs @ self.down.T) @ self.up.T


def svdquant(
    weight: torch.Tensor,
    tokens: torch.Tensor,
    settings: SvdquantSettings,
    largest: torch.Tensor | None = None,
    gram: torch.Tensor | None = None,
    site: str = "weight",
) -> LowRankSplit:
    """Search smoothing, then fit branch and residual to each other, then round the residual with compensation.

    Args:
        weight: [N, M] the stacked weights of every layer that reads the tokens.
        tokens: [T, M] a sample of the inputs; a few hundred are enough to compare candidates.
        settings: see `SvdquantSettings`.
        largest: [M] largest magnitude of each channel over all inputs; that of the tokens by default.
        gram: [M, M] mean of x x^T over all inputs; GPTQ rounds the residual when it is given.
        site: named in errors.

    Returns:
        The best of what was tried, by the output error on the tokens.

    Raises:
        UsageError: the rank is above what the weight can have, the Gram does not fit, or clip has no Gram.
        StepfoldError: the Gram is not positive definite.
    """
    _expect(weight, settings, gram, site)
    return _fitted(_Search(weight, tokens, settings), branch_smoothing(weight, tokens, settings, largest), gram, site)


def branch_smoothing(
    weight: torch.Tensor, tokens: torch.Tensor, settings: SvdquantSettings, largest: torch.Tensor | None = None
) -> Smoothing:
    """The smoothing of least error with a branch that is nearly the best; arguments as in `svdquant`."""
    search = _Search(weight, tokens, settings)
    largest = tokens.abs().amax(dim=0) if largest is None else largest
    return search_smoothing(largest, weight, search.quick_error, svdquant_candidates(settings.steps))


def branch_and_residual(
    weight: torch.Tensor,
    tokens: torch.Tensor,
    settings: SvdquantSettings,
    gram: torch.Tensor | None = None,
    site: str = "weight",
) -> LowRankSplit:
    """`svdquant` of a weight that is smoothed already."""
    _expect(weight, settings, gram, site)
    return _fitted(_Search(weight, tokens, settings), Smoothing(0, 0, weight.new_ones(weight.shape[1]), 0), gram, site)


def _fitted(search: _Search, smoothing: Smoothing, gram: torch.Tensor | None, site: str) -> LowRankSplit:
    split = search.alternated(smoothing)
    return split if gram is None else search.compensated(split, gram, site)


def _expect(weight: torch.Tensor, settings: SvdquantSettings, gram: torch.Tensor | None, site: str) -> None:
    highest = min(weight.shape)
    if not 0 <= settings.rank <= highest:
        raise UsageError(f"{site}: rank: expected 0 to {highest} = min(N, M); received {settings.rank}. Lower it.")
    if gram is not None:
        expect_gram(weight, gram, site)
    elif settings.clip:
        raise UsageError(
            f"{site}: clip: expected a Gram to judge ranges with; received none. Collect it, or do not clip."
        )


class _Search:
    """One weight and the tokens that judge what becomes of it."""

    def __init__(self, weight: torch.Tensor, tokens: torch.Tensor, settings: SvdquantSettings):
        self.weight, self.tokens, self.settings = weight, tokens, settings
        self.outputs = tokens @ weight.T

    def quick_error(self, scale: torch.Tensor) -> float:
        """The error of a smoothing scale [M] with a branch that is nearly the best."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        smoothing = Smoothing(0, 0, scale, 0)
        return self._split(smoothing, self.weight, lambda matrix: sketched(matrix, self.settings.rank, generator)).error

    def alternated(self, smoothing: Smoothing) -> LowRankSplit:
        """Branch of the weight; then of the weight less the rounded residual, as long as that helps."""
        best = self._split(smoothing, self.weight, self._truncated)
        for _ in range(self.settings.iterations):
            remaining = self.weight - best.residual.weight / smoothing.scale
            tried = self._split(smoothing, remaining, self._truncated)
            if tried.error >= best.error:
                break
            best = tried
        return best

    def compensated(self, split: LowRankSplit, gram: torch.Tensor, site: str) -> LowRankSplit:
        """The split with its residual rounded by GPTQ, if that is better."""
        scale, grid = split.smoothing.scale, self.settings.weight_grid
        residual = self.weight * scale - split.up @ split.down
        inputs = gram / torch.outer(scale, scale)
        scales = clipped_scales(residual, grid, inputs.to(residual.dtype)) if self.settings.clip else None
        tried = self._judged(replace(split, residual=gptq(residual, inputs, grid, scales, site=site).quantized))
        return tried if tried.error < split.error else split

    def _truncated(self, matrix: torch.Tensor) -> Factors:
        return truncated(matrix, self.settings.rank)

    def _split(
        self, smoothing: Smoothing, target: torch.Tensor, factorize: Callable[[torch.Tensor], Factors]
    ) -> LowRankSplit:
        """The branch of a target [N, M], and the rest of the weight rounded to nearest."""
        up, down = factorize(target * smoothing.scale)
        residual = Quantized.of(self.weight * smoothing.scale - up @ down, self.settings.weight_grid)
        return self._judged(LowRankSplit(smoothing, up, down, residual, 0.0))

    def _judged(self, split: LowRankSplit) -> LowRankSplit:
        return replace(split, error=drift(split.apply(self.tokens, self.settings.activation_grid), self.outputs))
