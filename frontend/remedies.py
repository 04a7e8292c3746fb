"""Why a scheduler does not fold, as far as its configuration tells, and what to do about it."""

from __future__ import annotations

from typing import Any

DETERMINISTIC = (
    "choose a deterministic scheduler, such as DDIMScheduler, DPMSolverMultistepScheduler or EulerDiscreteScheduler."
)
STOCHASTIC = (
    "stochastic: it adds noise of a kind that the fold does not hold (two runs with different seeds differ, or a draw has "
    f"another size than the latent); {DETERMINISTIC}"
)

UNBOUNDED = f"Set clip_sample and thresholding to false in its configuration, or {DETERMINISTIC}"
"""What to do about a bound that the fold does not hold."""


def about_variance(scheduler: Any) -> str:
    """What a failed step may be due to, a sentence with a space behind it; empty where nothing is known."""
    variance = scheduler.config.get("variance_type")
    if not (isinstance(variance, str) and variance.startswith("learned")):
        return ""
    return (
        f"variance_type {variance!r} takes half of the denoiser output as a variance; the fold expects the prediction "
        "alone: remove the key from its configuration, with a denoiser that returns only that. "
    )
