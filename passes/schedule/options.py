"""Options of the schedule pass."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ...loop.budget import QualityBudget
from ..base import Options
from .methods import METHODS
from .outline import FITTED

MINIMUM_VALIDATION = 64
"""A budget is met by the lower 95 % bound of the mean, and the tail, of at least so many validation samples."""


MOST_SAMPLES = 100_000
"""Of one set: the full loop runs for each of them, and its latents are kept."""


class ScheduleOptions(Options):
    """Options of `schedule`.

    Attributes:
        evaluations: denoiser calls in the plan, or `auto` for the fewest that meet `min_psnr`.
        min_psnr: quality budget in dB against the full loop, on validation samples: that of the mean, or `{mean: 40,
            p05: 34}` with one of the 5th percentile.
        samples: calibration samples the updates are fitted on.
        search_samples: how many of them score a candidate during the search.
        validation: samples that choose between schedules.
        outputs: newest guided outputs an update may weigh.
        directions: newest guidance directions an update may weigh beside them.
        moves: random moves of positions that are tried for one number of evaluations.
        fill: methods that may fill a body of a cut at an evaluation that does not compute it.
    """

    evaluations: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    min_psnr: QualityBudget | None = QualityBudget(mean=40.0)
    samples: int = Field(default=40, ge=4, le=MOST_SAMPLES)
    search_samples: int = Field(default=16, ge=2, le=MOST_SAMPLES)
    validation: int = Field(default=MINIMUM_VALIDATION, ge=MINIMUM_VALIDATION, le=MOST_SAMPLES)
    outputs: int = Field(default=3, ge=1, le=8)
    directions: int = Field(default=2, ge=0, le=8)
    moves: int = Field(default=64, ge=0, le=10_000)
    fill: tuple[str, ...] = (FITTED,)

    @field_validator("fill")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METHODS:
                raise ValueError(f"expected methods: {', '.join(METHODS)}")
        return value
