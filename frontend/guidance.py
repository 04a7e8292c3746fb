"""The form of a pipeline's guidance, from what its scheduler was given in all steps.

A guided output is a weighted sum of two branches, with a scale that may differ from step to step, times a number that may
follow the size of the sum: one for each sample, or for each row of its last axis. `row_weights` takes a step apart in this
way, and `Guidance` finds the one rule that explains all steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..loop.errors import UsageError
from ..loop.spec import GuidanceSpec, RescaleSpec

TOLERANCE = 1e-3
"""Relative; of factors and scales that are found from float32 values, row by row and step by step."""

BY_HAND = "Turn that off, or write a loop.yaml for the denoiser alone."
OVER = ("sample", "row")
MEASURES = ("norm", "deviation")


@dataclass(frozen=True)
class RowWeights:
    """A received output as `factor (one + share (two - one))`, with one factor for each row.

    Attributes:
        share: weight of the second branch, the same in all rows.
        factor: [R, 1].
        over: meaning of a row, as in `RescaleSpec`.
    """

    share: float
    factor: torch.Tensor
    over: str


def rows_of(value: torch.Tensor, over: str) -> torch.Tensor:
    """A tensor [B, ...] as rows [R, values] in float64."""
    return value.double().reshape(-1, value.shape[-1] if over == "row" else value[0].numel())


def row_weights(
    received: torch.Tensor, one: torch.Tensor, two: torch.Tensor, over: str, tolerance: float
) -> RowWeights | None:
    """Take an output apart into two branches row by row; None where it is no such sum, or its shares differ.

    Args:
        received: [B, ...] output that the scheduler was given.
        one: [B, ...] output of a branch.
        two: [B, ...] output of the other.
        over: meaning of a row.
        tolerance: relative error that rounding may make.
    """
    b, x, y = (rows_of(value, over) for value in (received, one, two))
    if b.shape[1] < 2:
        return None
    gram = torch.stack([(x * x).sum(1), (x * y).sum(1), (y * x).sum(1), (y * y).sum(1)], 1).reshape(-1, 2, 2)
    right = torch.stack([(x * b).sum(1), (y * b).sum(1)], 1)
    weights = torch.linalg.lstsq(gram, right[:, :, None]).solution[:, :, 0]
    rest = torch.linalg.norm(b - weights[:, :1] * x - weights[:, 1:] * y)
    if not rest <= tolerance * torch.linalg.norm(b):
        return None
    factor = weights.sum(1, keepdim=True)
    share = float((weights[:, 1:] * factor).sum() / (factor * factor).sum())
    uneven = torch.linalg.norm(weights[:, 1:] - share * factor)
    same_sign = bool((factor > 0).all() or (factor < 0).all())
    return RowWeights(share, factor, over) if same_sign and uneven <= TOLERANCE * torch.linalg.norm(weights) else None


@dataclass
class Guidance:
    """What all steps of a loop say about its guidance.

    Attributes:
        scales: scale of each step, 1 where one branch ran.
    """

    scales: list[float] = field(default_factory=list)
    _factors: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _ratios: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    _guided: int = 0

    def add(self, scale: float, received: torch.Tensor, conditional: torch.Tensor, other: torch.Tensor | None) -> None:
        """Note a step.

        Args:
            scale: guidance scale of the step.
            received: [B, ...] output that the scheduler was given, its sign that of linear guidance.
            conditional: [B, ...] output of the conditional branch.
            other: [B, ...] output of the unconditional branch; None where it did not run.
        """
        self.scales.append(scale)
        if other is None:
            return
        self._guided += 1
        linear = other + scale * (conditional - other)
        for over in OVER:
            got, wanted, base = (rows_of(value, over) for value in (received, linear, conditional))
            factor = (got * wanted).sum(1, keepdim=True) / (wanted * wanted).sum(1, keepdim=True)
            if torch.linalg.norm(got - factor * wanted) <= TOLERANCE * torch.linalg.norm(got):
                self._factors.setdefault(over, []).append(factor.numpy().ravel())
                for measure in MEASURES:
                    ratio = _size(base, measure) / _size(wanted, measure)
                    self._ratios.setdefault((over, measure), []).append(ratio.numpy())

    def factor(self) -> float | None:
        """The number by which all outputs are multiplied, where it is the same everywhere."""
        factors = self._factors_over("row")
        mean = 1.0 if factors is None else round(float(factors.mean()), 6)
        return mean if factors is not None and _error(np.full_like(factors, mean), factors) <= TOLERANCE else None

    def rescale(self) -> RescaleSpec:
        """The rule by which outputs that are not all multiplied by one number are rescaled.

        Raises:
            UsageError: there is none that the fold holds.
        """
        found: list[tuple[float, RescaleSpec]] = []
        for over in OVER:
            factors = self._factors_over(over)
            if factors is None:
                continue
            for measure in MEASURES:
                ratios = np.concatenate(self._ratios[over, measure])
                found += [
                    (_error(_predicted(spec, ratios), factors), spec) for spec in _rules(over, measure, factors, ratios)
                ]
        error, spec = min(found, key=lambda one: one[0], default=(np.inf, RescaleSpec()))
        if error > TOLERANCE:
            raise UsageError(
                "the pipeline rescales its guided output by a factor that follows neither the norm nor the deviation of the "
                f"conditional output, which the fold does not hold. {BY_HAND}"
            )
        return spec

    def _factors_over(self, over: str) -> np.ndarray | None:
        """The factors of all guided steps by row, where every step has them."""
        factors = self._factors.get(over, [])
        return np.concatenate(factors) if factors and len(factors) == self._guided else None


def in_all_steps(guidance: GuidanceSpec, seen: Guidance) -> GuidanceSpec:
    """A specification that was inferred from the first steps, with what all steps say.

    Raises:
        UsageError: a scale is below 1, or the outputs are rescaled by no rule that the fold holds.
    """
    least, scale = min(seen.scales), max(seen.scales)
    if least < 1 - TOLERANCE:
        raise UsageError(
            f"the pipeline mixes its two branches at a guidance scale of {least:g}; the fold expects a scale above 1, or "
            "one branch. Call it with another scale: --guidance SCALE."
        )
    changed: dict[str, Any] = {"scale": scale}
    if scale - least > TOLERANCE * scale:
        changed["strength"] = tuple(max(0.0, round((one - 1.0) / (scale - 1.0), 6)) for one in seen.scales)
    if seen.factor() is None:
        changed["rescale"] = seen.rescale()
    return guidance.model_copy(update=changed)


def _rules(over: str, measure: str, factors: np.ndarray, ratios: np.ndarray) -> list[RescaleSpec]:
    """The rules of a kind that come nearest to what was seen."""
    found = []
    share = float(((factors - 1) * (ratios - 1)).sum() / max(((ratios - 1) ** 2).sum(), 1e-30))
    if TOLERANCE < share <= 1 + TOLERANCE:
        found.append({"share": min(1.0, round(share, 4))})
    smaller = factors < 1 - TOLERANCE
    if smaller.any():
        found.append({"limit": round(float(np.median(factors[smaller] / ratios[smaller])), 4)})
    rules = ({"over": over, "measure": measure} | numbers for numbers in found)
    return [RescaleSpec.model_validate(rule) for rule in rules if rule.get("limit", 1.0) > 0]


def _predicted(rescale: RescaleSpec, ratios: np.ndarray) -> np.ndarray:
    factor = ratios if rescale.limit is None else np.minimum(1.0, rescale.limit * ratios)
    return rescale.share * factor + 1.0 - rescale.share


def _error(predicted: np.ndarray, factors: np.ndarray) -> float:
    return float(np.linalg.norm(predicted - factors) / np.linalg.norm(factors))


def _size(rows: torch.Tensor, measure: str) -> torch.Tensor:
    return torch.linalg.norm(rows, dim=1) if measure == "norm" else rows.std(dim=1, correction=0)
