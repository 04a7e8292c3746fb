"""Why a scheduler does not fold, as far as its configuration tells, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DETERMINISTIC = (
    "choose a deterministic scheduler, such as DDIMScheduler, DPMSolverMultistepScheduler or EulerDiscreteScheduler."
)
STOCHASTIC = (
    "stochastic: it adds noise of a kind that the fold does not hold (two runs with different seeds differ, or a draw has "
    f"another size than the latent); {DETERMINISTIC}"
)

NONLINEAR_KEYS: Mapping[str, tuple[str, str]] = {
    "clip_sample": ("it clips the predicted sample", "set clip_sample: false"),
    "clip_denoised": ("it clips the predicted sample", "set clip_denoised: false"),
    "thresholding": ("it rescales the predicted sample by a quantile of itself", "set thresholding: false"),
}
"""Configuration keys that make the step of most schedulers non-linear, with the value that folds.

They explain a step that turned out not to be linear; they are no reason to refuse one that is.
"""


def about_variance(scheduler: Any) -> str:
    """What a failed step may be due to, a sentence with a space behind it; empty where nothing is known."""
    variance = scheduler.config.get("variance_type")
    if not (isinstance(variance, str) and variance.startswith("learned")):
        return ""
    return (
        f"variance_type {variance!r} takes half of the denoiser output as a variance; the fold expects the prediction "
        "alone: remove the key from its configuration, with a denoiser that returns only that. "
    )


def cause(scheduler: Any) -> str:
    """Why a step is not linear, with `: ` behind it, as far as its configuration tells; else empty."""
    key = next((key for key in NONLINEAR_KEYS if scheduler.config.get(key)), None)
    return f"{key} is {scheduler.config[key]!r}, so {NONLINEAR_KEYS[key][0]}: " if key else ""


def remedy(scheduler: Any) -> str:
    """What to do about a step that is not linear."""
    found = next((remedy for key, (_, remedy) in NONLINEAR_KEYS.items() if scheduler.config.get(key)), None)
    return f"C{DETERMINISTIC[1:]}" if found is None else f"To fold it, {found} in the scheduler's configuration."
