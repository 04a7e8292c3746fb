"""Fit the updates of a schedule, sequentially and in the closed loop.

Start from the calibration noise, evaluate at the first position, solve a small least-squares problem for the update
that best reaches the reference trajectory at the next position, apply it, go on from *there*. Each fit absorbs the
error made before it, and the error of the engine that is being fitted (Bespoke Non-Stationary solvers,
arXiv 2403.01329, without gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from ...calibration.trajectories import Trajectories
from ...loop.driver import LoopRun, run_loop
from ...loop.plan import Plan, fold
from ...loop.ports import BoundProgram
from ...loop.recurrence import Array, Recurrence
from ...loop.spec import LoopSpec
from .terms import Term, Terms, basis, forget, prior_weights, row

RIDGE = 1e-7
"""Ridge of the least squares, relative to the mean square of the terms; pulls towards the unfitted update."""


@dataclass(frozen=True)
class Outline:
    """Which calls are evaluated, and on which of them both guidance branches run."""

    positions: tuple[int, ...]
    unguided: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted plan and the samples it makes from the calibration noise."""

    plan: Plan
    samples: Array


@dataclass(frozen=True, eq=False)
class Trace:
    """A fit as it went, so that another that begins alike may go on from where they part.

    Attributes:
        outline: outline that was fitted.
        fit: its result.
        stands: the runs after each evaluation and before its update.
    """

    outline: Outline
    fit: Fit
    stands: tuple[tuple[LoopRun, ...], ...]

    def shared(self, outline: Outline) -> int:
        """How many evaluations of an outline are those of this fit: each is at a position the updates before it aimed at."""
        alike = (
            mine == other and (mine in self.outline.unguided) == (other in outline.unguided)
            for mine, other in zip(self.outline.positions, outline.positions, strict=False)
        )
        return sum(1 for _ in takewhile(bool, alike))


class Fitter:
    """Fits outlines on one engine, one guidance scale and one set of reference trajectories."""

    def __init__(
        self, bound: BoundProgram, loop: LoopSpec, recurrence: Recurrence, scale: float | None, data: Trajectories
    ):
        """Fit with the outputs of `bound` against the latents of `data`."""
        self.bound, self.loop, self.recurrence, self.scale, self.data = bound, loop, recurrence, scale, data

    def fit(self, outline: Outline, terms: Terms) -> Fit:
        """Solve for every update of an outline, one after the other, in the closed loop."""
        return self._fit(outline, terms, None, lambda runs: None)

    def traced(self, outline: Outline, terms: Terms, like: Trace | None = None) -> Trace:
        """`fit`, going on from where a fit with the same terms parts from this one. Holds every output."""
        known = 0 if like is None else like.shared(outline)
        stands = [] if like is None else list(like.stands[: max(0, known - 1)])
        fit = self._fit(outline, terms, like, lambda runs: stands.append(tuple(run.fork() for run in runs)))
        return Trace(outline, fit, tuple(stands))

    def _fit(self, outline: Outline, terms: Terms, like: Trace | None, keep: Callable[[list[LoopRun]], None]) -> Fit:
        """Fit an outline; `keep` sees the runs after each evaluation that is not taken from another fit."""
        prior = fold(self.recurrence, self.scale, outline.positions, order=1)
        plan = _with_branches(prior, outline)
        N, known = plan.evaluations, 0 if like is None else like.shared(outline)
        runs = self.runs(plan)
        state, conditional, unconditional = np.ones(N), np.zeros((N, N)), np.zeros((N, N))
        first = max(0, known - 1)  # the update after the last evaluation that both have aims elsewhere
        if like is not None and known:
            before = like.fit.plan
            state[:first] = before.state[:first]
            conditional[:first, :first] = before.conditional[:first, :first]
            unconditional[:first, :first] = before.unconditional[:first, :first]
            for run, stand in zip(runs, like.stands[first], strict=True):
                run.stand_where(stand)
        for k in range(first, N):
            for run in runs:
                if k >= known:
                    run.evaluate(k)
            keep(runs)
            target = self.data.latents[plan.landings[k]]
            chosen = basis(k, plan.guided, terms)
            weights = self._solve(runs, chosen, target, prior, k)
            solved = row(chosen, weights, plan.guided, self.scale)
            state[k], conditional[k], unconditional[k] = solved.state, solved.conditional, solved.unconditional
            for run in runs:
                run.update(state[k], conditional[k], unconditional[k])
                forget(run, k, plan.guided, terms)
        fitted = replace(plan, state=state, conditional=conditional, unconditional=unconditional)
        return Fit(fitted, np.concatenate([run.latent for run in runs]))

    def runs(self, plan: Plan) -> list[LoopRun]:
        """The samples of the data at the start of a plan's loop, in batches."""
        return [LoopRun(self.bound, self.loop, piece, plan) for piece in self.data.pieces]

    def samples(self, plan: Plan, data: Trajectories | None = None) -> Array:
        """The samples a plan makes from the noise of `data`."""
        pieces = (data or self.data).pieces
        return np.concatenate([run_loop(self.bound, self.loop, piece, plan) for piece in pieces])

    def _solve(self, runs: Sequence[LoopRun], chosen: list[Term], target: Array, prior: Plan, k: int) -> Array:
        """Ridge least squares over all samples, in float64: minimize |terms w - target|^2 + ridge |w - w0|^2."""
        m = len(chosen)
        gram, right, start = np.zeros((m, m)), np.zeros(m), 0
        for run in runs:
            columns = [term.value(run, self.scale).ravel().astype(np.float64) for term in chosen]
            goal = target[start : start + run.batch].ravel().astype(np.float64)
            start += run.batch
            gram += np.asarray([[a @ b for b in columns] for a in columns])
            right += np.asarray([a @ goal for a in columns])
        start_weights = prior_weights(chosen, prior, k)
        if not (np.isfinite(gram).all() and np.isfinite(right).all()):
            return start_weights  # the trajectory has left the range of numbers; nothing can be learned from it
        scale = np.sqrt(np.maximum(np.diag(gram), 1e-30))
        normalized = gram / np.outer(scale, scale)
        residual = right / scale - normalized @ (start_weights * scale)
        return start_weights + np.linalg.solve(normalized + RIDGE * np.eye(m), residual) / scale


def _with_branches(plan: Plan, outline: Outline) -> Plan:
    """The prior's positions with the outline's branches; weights are left to the fit."""
    guided = plan.guided & ~np.isin(plan.positions, list(outline.unguided))
    zero = np.zeros_like(plan.conditional)
    return replace(plan, guided=guided, conditional=zero, unconditional=zero)
