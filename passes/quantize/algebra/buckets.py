"""One activation scale for all timesteps, one for each bucket of them, or scales taken at run time.

What a layer reads grows and shrinks over the timesteps. One static range wastes bits where values are small; the rule
and its figures are measured on ranges that drift (Q-Diffusion and PTQ4DiT report the drift, arXiv 2302.04304 and
2405.16005).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ....calibration.document import STEADY
from ....loop.errors import UsageError


@dataclass(frozen=True)
class ActivationPlan:
    """How the activations of a site get their scale.

    Attributes:
        kind: `static`, `bucketed` or `dynamic`.
        spread: largest range over the median range.
        ranges: (low, high): one pair if static, one for each bucket if bucketed, none if dynamic.
    """

    kind: Literal["static", "bucketed", "dynamic"]
    spread: float
    ranges: tuple[tuple[float, float], ...]


def plan_activations(low: torch.Tensor, high: torch.Tensor, dynamic: bool) -> ActivationPlan:
    """Choose by how far the ranges of the buckets differ.

    Args:
        low: [buckets] smallest value seen in each bucket of timesteps, over both guidance branches.
        high: [buckets] largest value.
        dynamic: whether the engine takes scales at run time.

    Raises:
        UsageError: ranges are missing, not finite, or the wrong way round.
    """
    _expect_ranges(low, high)
    low, high = low.clamp(max=0), high.clamp(min=0)
    ranges = torch.maximum(-low, high)
    middle = float(ranges.quantile(0.5))
    spread = float(ranges.amax()) / middle if middle else (1.0 if not ranges.any() else float("inf"))
    if spread <= STEADY:
        return ActivationPlan("static", spread, ((float(low.amin()), float(high.amax())),))
    if dynamic:
        return ActivationPlan("dynamic", spread, ())
    return ActivationPlan("bucketed", spread, tuple(zip(low.tolist(), high.tolist(), strict=True)))


def _expect_ranges(low: torch.Tensor, high: torch.Tensor) -> None:
    if low.ndim != 1 or low.shape != high.shape or not low.numel():
        received = f"{tuple(low.shape)} and {tuple(high.shape)}"
        raise UsageError(f"ranges: expected one low and one high for each bucket; received shapes {received}.")
    if not (torch.isfinite(low).all() and torch.isfinite(high).all() and (low <= high).all()):
        raise UsageError("ranges: expected finite low <= high in each bucket; received others. Calibrate again.")
