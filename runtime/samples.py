"""Samples on their way out: finite numbers or an error."""

from __future__ import annotations

import numpy as np

from ..loop.errors import StepfoldError

Array = np.ndarray


def finite(samples: Array, what: str = "samples") -> Array:
    """The samples [B, ...] as they are.

    Args:
        samples: samples to give away.
        what: they are, for the message.

    Raises:
        StepfoldError: some are NaN or infinite.
    """
    wrong = ~np.isfinite(samples)
    if wrong.any():
        rows = np.flatnonzero(wrong.reshape(len(samples), -1).any(axis=1))
        raise StepfoldError(
            f"{what}: expected finite numbers; received {int(wrong.sum())} that are NaN or infinite, in {len(rows)} of "
            f"{len(samples)}, the first of them number {int(rows[0])}. Try a smaller guidance scale, and check the bundle "
            "with `stepfold verify`."
        )
    return samples
