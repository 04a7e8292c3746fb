"""Polish a fitted plan: all of its weights together, towards the samples, by Gauss-Newton in the closed loop.

The sequential fit aims every update at the reference trajectory; what counts is where the last one ends. Here each
weight is nudged in turn and the rest of the loop is run with the engine, which gives one column of the Jacobian of the
samples; a damped least-squares step then moves all weights at once. Nothing has to be differentiable, so the rounding
of an int8 engine is part of what is fitted. Bespoke Non-Stationary solvers (arXiv 2403.01329) optimize the same weights
by gradient descent through the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ...loop.driver import LoopRun
from ...loop.plan import Plan
from ...loop.recurrence import Array
from .fit import Fit, Fitter
from .terms import Term, Terms, basis, forget, update_of

NUDGE = 0.02
"""Size of a nudge relative to the samples: above the rounding of an int8 engine, below the bends of the loop."""

DAMPINGS = (1e-2, 1e-3, 1e-4, 1e-5)
"""Ridges, relative to the squared columns, of which the step with the best samples is taken."""

LEAST_ERROR = 1e-8
"""Mean squared error below which a sample weighs no more."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Weight:
    """One unknown: the weight of a term in update k."""

    k: int
    chosen: tuple[Term, ...]
    index: int

    @property
    def term(self) -> Term:
        """The term it multiplies."""
        return self.chosen[self.index]


@dataclass
class Normal:
    """Normal equations of the nudged loop, summed over batches: columns^T columns and columns^T error."""

    gram: Array
    right: Array

    def add(self, columns: Array, error: Array) -> None:
        """Add the values of one batch: columns [P, values], error [values]."""
        self.gram += columns @ columns.T
        self.right += columns @ error

    def step(self, damping: float) -> Array:
        """Change [P] of the weights."""
        scale = np.sqrt(np.maximum(np.diag(self.gram), 1e-30))
        normalized = self.gram / np.outer(scale, scale)
        return -np.linalg.solve(normalized + damping * np.eye(len(scale)), self.right / scale) / scale


def polish(fitter: Fitter, fit: Fit, terms: Terms, progress: Progress) -> Fit:
    """One Gauss-Newton step on the weights of a fitted plan, or the fit itself when no step improves it.

    The error of each sample is divided by its mean square, so that the step follows the mean PSNR.

    Args:
        fitter: engine and calibration trajectories.
        fit: a plan and its samples.
        terms: what an update may weigh.
        progress: called with (weights nudged, weights in all).

    Returns:
        The plan with the best mean PSNR on the calibration samples.
    """
    if not np.isfinite(fit.samples).all():
        return fit
    weights = _weights(fit.plan, terms)
    normal = _normal_equations(fitter, fit, weights, terms, progress)
    plans = [_moved(fit.plan, weights, normal.step(damping)) for damping in DAMPINGS]
    fits = [fit, *(Fit(plan, fitter.samples(plan)) for plan in plans)]
    return max(fits, key=lambda one: float(fitter.psnr(one.samples, fitter.data.latents[-1]).mean()))


def _weights(plan: Plan, terms: Terms) -> list[Weight]:
    chosen = [tuple(basis(k, plan.guided, terms)) for k in range(plan.evaluations)]
    return [Weight(k, row_terms, i) for k, row_terms in enumerate(chosen) for i in range(len(row_terms))]


def _normal_equations(fitter: Fitter, fit: Fit, weights: list[Weight], terms: Terms, progress: Progress) -> Normal:
    """Nudge every weight on every batch. One batch at a time, so the columns of one are all that is held."""
    target = fitter.data.latents[-1]
    nudge = NUDGE * float(np.sqrt(np.mean(np.square(target, dtype=np.float64))))
    normal = Normal(np.zeros((len(weights), len(weights))), np.zeros(len(weights)))
    runs, start = fitter.runs(fit.plan), 0
    total = len(runs) * len(weights)
    for done, run in enumerate(runs):
        stop = start + run.batch
        error = (fit.samples[start:stop] - target[start:stop]).reshape(run.batch, -1).astype(np.float64)
        importance = 1 / np.sqrt(np.maximum(np.square(error).mean(axis=1, keepdims=True), LEAST_ERROR))
        columns = []
        for k, stand in enumerate(_stands(run, fit.plan, terms)):
            for weight in (weight for weight in weights if weight.k == k):
                ahead = _nudged(stand, weight, nudge, fit.plan)
                change = (ahead.samples - fit.samples[start:stop]).reshape(run.batch, -1) / ahead.size
                columns.append((change * importance).ravel())
                progress(done * len(weights) + len(columns), total)
        normal.add(np.stack(columns), (error * importance).ravel())
        start = stop
    return normal


@dataclass(frozen=True, eq=False)
class Nudged:
    """Samples after a weight was changed by `size`."""

    samples: Array
    size: float


def _stands(run: LoopRun, plan: Plan, terms: Terms) -> Iterator[LoopRun]:
    """The run after each evaluation and before its update, with every term still in its ring."""
    for k in range(plan.evaluations):
        run.evaluate(k)
        yield run
        run.update(k, plan.update(k))
        forget(run, k, plan.guided, terms)


def _nudged(stand: LoopRun, weight: Weight, nudge: float, plan: Plan) -> Nudged:
    """The rest of the loop after one weight of the update that comes next was changed."""
    value = weight.term.value(stand, plan)
    size = nudge / max(float(np.sqrt(np.mean(np.square(value, dtype=np.float64)))), 1e-12)
    run = stand.fork()
    run.advance(weight.k, plan)
    run.latent = run.latent + np.float32(size) * value
    for k in range(weight.k + 1, plan.evaluations):
        run.evaluate(k)
        run.advance(k, plan)
    return Nudged(run.latent, size)


def _moved(plan: Plan, weights: list[Weight], change: Array) -> Plan:
    """The plan with its weights changed."""
    updates = [plan.update(k) for k in range(plan.evaluations)]
    for weight, value in zip(weights, change, strict=True):
        only = np.where(np.arange(len(weight.chosen)) == weight.index, value, 0.0)
        updates[weight.k] = updates[weight.k].plus(update_of(weight.chosen, only, plan))
    return plan.with_updates(updates)
