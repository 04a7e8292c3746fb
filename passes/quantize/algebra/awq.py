"""AWQ: protect the input channels that matter by scaling them up before rounding (Lin et al., arXiv 2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .clipping import clipped_scales
from .errors import expect_gram, output_error
from .grids import Grid, Quantized

RATIOS = 20
SMALLEST_SCALE = 1e-4


@dataclass(frozen=True, eq=False)
class Protected:
    """A weight rounded after its input channels were scaled: it reads `x / scale`.

    Attributes:
        scale: [M].
        ratio: exponent of the mean magnitudes; 0 scales nothing.
        quantized: `W diag(scale)` [N, M] on its grid.
        error: output error `tr(D G D^T)`.
        baseline: the same for rounding to nearest without scale, never smaller.
    """

    scale: torch.Tensor
    ratio: float
    quantized: Quantized
    error: float
    baseline: float


def awq(
    weight: torch.Tensor,
    mean_magnitude: torch.Tensor,
    gram: torch.Tensor,
    grid: Grid,
    clip: bool = False,
    site: str = "weight",
) -> Protected:
    """Search the scale `a**ratio / sqrt(max * min)` over ratio = 0, 0.05 ... 0.95.

    Args:
        weight: [N, M] the stacked weights of every layer that reads the input.
        mean_magnitude: a [M], mean of |x|.
        gram: [M, M] mean of x x^T over the inputs.
        grid: what to round to.
        clip: search the ranges of the groups too, under the best scale.
        site: named in errors.

    Raises:
        UsageError: the Gram does not fit or is not finite.
    """
    expect_gram(weight, gram, site)
    gram = gram.to(weight.dtype)
    found: Protected | None = None
    for step in range(RATIOS):
        scale = _scale(mean_magnitude.to(weight.dtype), step / RATIOS)
        quantized = Quantized.of(weight * scale, grid)
        error = output_error(quantized.weight / scale - weight, gram)
        if found is None or error < found.error:
            found = Protected(scale, step / RATIOS, quantized, error, error if found is None else found.baseline)
    assert found is not None
    return _clipped(weight, gram, grid, found) if clip else found


def _scale(mean_magnitude: torch.Tensor, ratio: float) -> torch.Tensor:
    """[M], centred between its extremes; 1 for ratio 0."""
    powered = mean_magnitude**ratio
    scale = powered.clamp(min=SMALLEST_SCALE)
    return scale / (scale.amax() * scale.amin()).sqrt()


def _clipped(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, found: Protected) -> Protected:
    """The result with narrower ranges where those are better for the output as a whole."""
    scale = found.scale
    scaled = weight * scale
    quantized = Quantized.of(scaled, grid, clipped_scales(scaled, grid, gram / torch.outer(scale, scale)))
    error = output_error(quantized.weight / scale - weight, gram)
    return Protected(scale, found.ratio, quantized, error, found.baseline) if error < found.error else found
