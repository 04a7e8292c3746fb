"""Quality budgets: what the PSNR of samples has to reach, on average and at its worst."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, model_serializer, model_validator

from .metrics import lower_bound
from .options import Options

TAIL = 5.0
"""Percentile of the samples that a budget may bound beside their mean."""

FORM = "a number of decibels, 0 or more, or a mean with a tail, as in {mean: 40, p05: 34}"


@dataclass(frozen=True)
class PsnrFigures:
    """PSNR of samples in dB.

    Attributes:
        mean: mean of the samples.
        low: lower 95 % confidence bound of the mean.
        p05: 5th percentile of the samples.
        min: worst sample.
    """

    mean: float
    low: float
    p05: float
    min: float

    @classmethod
    def of(cls, values: np.ndarray) -> PsnrFigures:
        """The figures of samples [B]."""
        return cls(float(values.mean()), lower_bound(values), float(np.percentile(values, TAIL)), float(values.min()))


class QualityBudget(Options):
    """What the PSNR of samples has to reach: a number, which bounds the mean, or `{mean: 40, p05: 34}`.

    Attributes:
        mean: least mean in dB, met by its lower 95 % confidence bound.
        p05: least 5th percentile in dB; None for a budget without a tail.
    """

    mean: float = Field(ge=0)
    p05: float | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        """The fields of what a recipe says; raises ValueError."""
        if isinstance(value, Mapping) and "mean" in value and set(value) <= set(cls.model_fields):
            return value
        if isinstance(value, cls):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"mean": value}
        raise ValueError(f"expected {FORM}")

    @model_serializer
    def plain(self) -> float | dict[str, float]:
        """The budget as a recipe says it."""
        return self.mean if self.p05 is None else {"mean": self.mean, "p05": self.p05}

    def __str__(self) -> str:
        return f"{self.mean:g} dB" + ("" if self.p05 is None else f" and {self.p05:g} dB at the 5th percentile")

    def shortfall(self, psnr: PsnrFigures) -> float:
        """By how many dB figures miss the bound that they miss most; at most 0 where they meet the budget."""
        mean = self.mean - psnr.low
        return mean if self.p05 is None else max(mean, self.p05 - psnr.p05)

    def met_by(self, psnr: PsnrFigures) -> bool:
        """Whether figures meet the budget."""
        return self.shortfall(psnr) <= 0

    def of_latents(self, latents: PsnrFigures, images: PsnrFigures) -> QualityBudget:
        """The budget of latents whose images are likely to meet this one: what latents reached, and what images lack.

        Args:
            latents: figures of latents.
            images: figures of their images.
        """
        mean = max(self.mean, latents.low + self.mean - images.low)
        tail = None if self.p05 is None else max(self.p05, latents.p05 + self.p05 - images.p05)
        return QualityBudget(mean=mean, p05=tail)

    def reached(self, psnr: PsnrFigures, samples: str = "") -> str:
        """What figures reach, in words, and which of two bounds they miss.

        Args:
            psnr: figures to tell.
            samples: what they are of, with a preposition before it.
        """
        bound = f"lower 95 % bound of the mean{samples}"
        if self.p05 is None:
            return f"{psnr.low:.2f} dB ({bound})"
        mean, tail = ("met" if met else "missed" for met in (psnr.low >= self.mean, psnr.p05 >= self.p05))
        return f"{psnr.low:.2f} dB ({bound}; {mean}) and {psnr.p05:.2f} dB at the 5th percentile ({tail})"
