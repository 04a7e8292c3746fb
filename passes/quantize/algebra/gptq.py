"""GPTQ: round one input channel after the other and let those that follow make up for the error.

Frantar et al., GPTQ, arXiv 2210.17323; column order and static groups as in IST-DASLab/gptq.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....loop.errors import StepfoldError
from .errors import expect_gram
from .grids import Grid, Quantized, Scales

BLOCK = 128
"""Columns whose updates of what follows are applied at once."""

DAMPING = 0.01
"""Part of the mean of the Gram's diagonal that is added to it."""

ATTEMPTS = 8
"""How often a Gram is damped, twice as much each time, before it is refused."""


@dataclass(frozen=True, eq=False)
class Compensated:
    """A weight rounded with compensation.

    Attributes:
        quantized: the weight [N, M] on its grid.
        loss: `tr(D H D^T)` with D the change of the weight and H the damped Gram.
        damping: part of the mean diagonal that was added.
    """

    quantized: Quantized
    loss: float
    damping: float


def gptq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    grid: Grid,
    scales: Scales | None = None,
    order_by_activity: bool = True,
    damping: float = DAMPING,
    site: str = "weight",
) -> Compensated:
    """Round a weight so that its outputs change least.

    Every scale is fixed before the first column is rounded (static groups), so that columns keep their places and
    engines need no index of groups whatever the order.

    Args:
        weight: [N, M].
        gram: [M, M] mean of x x^T over the inputs, any positive factor.
        grid: what to round to.
        scales: scales of the grid for the weight; by default those that cover it.
        order_by_activity: begin with the input channels of largest second moment.
        damping: see `DAMPING`.
        site: named in errors.

    Raises:
        UsageError: the Gram does not fit or is not finite.
        StepfoldError: the Gram is not positive definite.
    """
    expect_gram(weight, gram, site)
    scales = grid.scales(weight) if scales is None else scales
    hessian = gram.to(torch.float64).clone()
    # A channel that was never active compensates for nothing and is rounded to nearest.
    hessian.diagonal()[hessian.diagonal() == 0] = 1
    M = hessian.shape[0]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if order_by_activity else torch.arange(M)
    factor, damping = _inverse_factor(hessian[order][:, order], damping, site)
    beside = _neighbours_before(order)
    rounded, loss = _round_columns(weight.to(torch.float64)[:, order], factor, grid, _permuted(scales, order), beside)
    restored = rounded[:, torch.argsort(order)].to(weight.dtype)
    return Compensated(Quantized.of(restored, grid, scales), loss, damping)


def _permuted(scales: Scales, order: torch.Tensor) -> Scales:
    """One scale for each column, in a new order, in float64."""
    scale, zero = scales.of_columns()
    return Scales(scale.to(torch.float64)[:, order], 1, None if zero is None else zero[:, order])


def _neighbours_before(order: torch.Tensor) -> list[int | None]:
    """Where the neighbour (see `Grid.fit`) of each channel stands in an order, None where it comes later or is missing."""
    places = torch.argsort(order).tolist()
    found = (places[channel ^ 1] if channel ^ 1 < len(places) else len(places) for channel in order.tolist())
    return [place if place < i else None for i, place in enumerate(found)]


def _inverse_factor(hessian: torch.Tensor, damping: float, site: str) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the inverse of the damped Gram [M, M], and the damping that made it possible."""
    mean = hessian.diagonal().abs().mean()
    identity = torch.eye(hessian.shape[0], dtype=torch.float64)
    for attempt in range(ATTEMPTS):
        added = damping * 2**attempt
        lower, failed = torch.linalg.cholesky_ex(hessian + added * mean * identity)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper, added
    raise StepfoldError(
        f"{site}: Gram not positive definite: expected one that {damping * 2 ** (ATTEMPTS - 1):g} of its mean diagonal "
        f"makes positive; received a smallest eigenvalue of {float(torch.linalg.eigvalsh(hessian)[0] / mean):.3g} of it. "
        "Collect it from more tokens, or raise the damping."
    )


def _round_columns(
    weight: torch.Tensor, factor: torch.Tensor, grid: Grid, scales: Scales, beside: Sequence[int | None]
) -> tuple[torch.Tensor, float]:
    """The rounded columns of a weight [N, M] and the sum of the squared, normalized errors.

    Of two neighbours that the grid couples, the one that is rounded later gives way, and what follows makes up for it.
    """
    work, loss = weight.clone(), 0.0
    codes: list[torch.Tensor] = []
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        errors = torch.empty_like(work[:, start:stop])
        for i in range(start, stop):
            scale = scales.scale[:, i]
            zero = None if scales.zero is None else scales.zero[:, i]
            code, before = grid.encode_at(work[:, i], scale, zero), beside[i]
            codes.append(code if before is None else grid.fit(code, codes[before]))
            column = grid.decode_at(codes[i], scale, zero)
            error = (work[:, i] - column) / factor[i, i]
            work[:, i] = column
            work[:, i + 1 : stop] -= error[:, None] * factor[i, i + 1 : stop]
            errors[:, i - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
        loss += float(errors.square().sum())
    return work, loss
