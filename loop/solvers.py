"""Solvers that are no diffusers class, as recurrences, and a cache that is a choice of calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .errors import UsageError
from .recurrence import Recurrence

AB2 = "ab2"  # the name of the two-step Adams-Bashforth method in `--baselines`
TAYLORSEER_LITE = "taylorseer_lite"
WARM_UP, INTERVAL, LAST = 6, 3, 2
"""Of TaylorSeer Lite, as OpenVINO GenAI has them by default."""


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


def taylorseer_lite(calls: int, evaluations: int | None = None) -> list[int]:
    """The calls that TaylorSeer Lite evaluates; between them it extrapolates the output by a line through the newest two.

    The first 6 and the last 2 are evaluated, and one in 3 between them, from the second one on (TaylorSeer,
    arXiv 2503.06923, on the output of the whole network; diffusers' `TaylorSeerCacheConfig` counts alike). The output of a
    call that is left out is the forecast of order 1 of `fold`.

    Args:
        calls: number of calls of the loop.
        evaluations: number of calls to evaluate, reached by another interval than 3; None keeps it.

    Raises:
        UsageError: no interval evaluates so many.
    """
    by_interval = {
        interval: [
            call
            for call in range(calls)
            if call < WARM_UP or (call - WARM_UP - 1) % interval == 0 or call >= calls - LAST
        ]
        for interval in range(2, max(calls, INTERVAL) + 1)
    }
    if evaluations is None:
        return by_interval[INTERVAL]
    found = next((positions for positions in by_interval.values() if len(positions) == evaluations), None)
    if found is None:
        counts = sorted({len(positions) for positions in by_interval.values()})
        raise UsageError(
            f"{TAYLORSEER_LITE} evaluates {', '.join(map(str, counts))} of {calls} calls, by its interval; received "
            f"{evaluations}."
        )
    return found
