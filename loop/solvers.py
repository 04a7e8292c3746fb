"""Solvers that are no diffusers class, as recurrences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .errors import UsageError
from .recurrence import Recurrence

AB2 = "ab2"  # the name of the two-step Adams-Bashforth method in `--baselines`


def adams_bashforth2(recurrence: Recurrence) -> Recurrence:
    """The two-step Adams-Bashforth method on the grid of an Euler sampler.

        x[i+1] = x[i] + h_i ((1 + r/2) v_i - r/2 v_{i-1}),  r = h_i / h_{i-1}

    The first step is Euler's. Second order in the step size, one denoiser call a step (Hairer, Norsett and Wanner,
    Solving Ordinary Differential Equations I, section III.5).

    Args:
        recurrence: an Euler sampler, `x[i+1] = x[i] + h_i v_i`.

    Raises:
        UsageError: the recurrence is not plain Euler.
    """
    steps = np.diag(recurrence.outputs)
    plain = np.allclose(recurrence.state, 1.0, rtol=0.0, atol=1e-6)
    diagonal = np.array_equal(recurrence.outputs, np.diag(steps))
    if not (plain and diagonal and (steps != 0.0).all()):
        raise UsageError(
            f"solver {AB2!r} replaces an Euler step x[i+1] = x[i] + h v[i]; the sampler of this loop is "
            f"{recurrence.depth} outputs deep with state weights from {recurrence.state.min():.4g} to "
            f"{recurrence.state.max():.4g}. Name a diffusers scheduler instead."
        )
    ratio = steps[1:] / steps[:-1]
    outputs = np.diag(steps)
    now, before = np.arange(1, recurrence.calls), np.arange(recurrence.calls - 1)
    outputs[now, now] = steps[1:] * (1.0 + ratio / 2.0)
    outputs[now, before] = -steps[1:] * ratio / 2.0
    return replace(recurrence, outputs=outputs)
