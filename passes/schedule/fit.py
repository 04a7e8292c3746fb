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
from ...loop.ports import BoundProgram
from ...loop.recurrence import Array, Recurrence
from ...loop.spec import LoopSpec
from ...loop.table import FoldedTable, fold
from .terms import Term, Terms, basis, forget, prior_weights, row

RIDGE = 1e-7
"""Ridge of the least squares, relative to the mean square of the terms; pulls towards the unfitted update."""


@dataclass(frozen=True)
class Plan:
    """Which calls are evaluated, and on which of them both guidance branches run."""

    positions: tuple[int, ...]
    unguided: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted table and the samples it makes from the calibration noise."""

    table: FoldedTable
    samples: Array


@dataclass(frozen=True, eq=False)
class Trace:
    """A fit as it went, so that another that begins alike may go on from where they part.

    Attributes:
        plan: plan that was fitted.
        fit: its result.
        stands: the runs after each evaluation and before its update.
    """

    plan: Plan
    fit: Fit
    stands: tuple[tuple[LoopRun, ...], ...]

    def shared(self, plan: Plan) -> int:
        """How many evaluations of a plan are those of this fit: each is at a position the updates before it aimed at."""
        alike = (
            mine == other and (mine in self.plan.unguided) == (other in plan.unguided)
            for mine, other in zip(self.plan.positions, plan.positions, strict=False)
        )
        return sum(1 for _ in takewhile(bool, alike))


class Fitter:
    """Fits plans on one engine, one guidance scale and one set of reference trajectories."""

    def __init__(
        self, bound: BoundProgram, loop: LoopSpec, recurrence: Recurrence, scale: float | None, data: Trajectories
    ):
        """Fit with the outputs of `bound` against the latents of `data`."""
        self.bound, self.loop, self.recurrence, self.scale, self.data = bound, loop, recurrence, scale, data

    def fit(self, plan: Plan, terms: Terms) -> Fit:
        """Solve for every update of a plan, one after the other, in the closed loop."""
        return self._fit(plan, terms, None, lambda runs: None)

    def traced(self, plan: Plan, terms: Terms, like: Trace | None = None) -> Trace:
        """`fit`, going on from where a fit with the same terms parts from this one. Holds every output."""
        known = 0 if like is None else like.shared(plan)
        stands = [] if like is None else list(like.stands[: max(0, known - 1)])
        fit = self._fit(plan, terms, like, lambda runs: stands.append(tuple(run.fork() for run in runs)))
        return Trace(plan, fit, tuple(stands))

    def _fit(self, plan: Plan, terms: Terms, like: Trace | None, keep: Callable[[list[LoopRun]], None]) -> Fit:
        """Fit a plan; `keep` sees the runs after each evaluation that is not taken from another fit."""
        prior = fold(self.recurrence, self.scale, plan.positions, order=1)
        table = _with_branches(prior, plan)
        N, known = table.evaluations, 0 if like is None else like.shared(plan)
        runs = self.runs(table)
        state, conditional, unconditional = np.ones(N), np.zeros((N, N)), np.zeros((N, N))
        first = max(0, known - 1)  # the update after the last evaluation that both have aims elsewhere
        if like is not None and known:
            before = like.fit.table
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
            target = self.data.latents[table.landings[k]]
            chosen = basis(k, table.guided, terms)
            weights = self._solve(runs, chosen, target, prior, k)
            solved = row(chosen, weights, table.guided, self.scale)
            state[k], conditional[k], unconditional[k] = solved.state, solved.conditional, solved.unconditional
            for run in runs:
                run.update(state[k], conditional[k], unconditional[k])
                forget(run, k, table.guided, terms)
        fitted = replace(table, state=state, conditional=conditional, unconditional=unconditional)
        return Fit(fitted, np.concatenate([run.latent for run in runs]))

    def runs(self, table: FoldedTable) -> list[LoopRun]:
        """The samples of the data at the start of a table's loop, in batches."""
        return [LoopRun(self.bound, self.loop, piece, table) for piece in self.data.pieces]

    def samples(self, table: FoldedTable, data: Trajectories | None = None) -> Array:
        """The samples a table makes from the noise of `data`."""
        pieces = (data or self.data).pieces
        return np.concatenate([run_loop(self.bound, self.loop, piece, table) for piece in pieces])

    def _solve(self, runs: Sequence[LoopRun], chosen: list[Term], target: Array, prior: FoldedTable, k: int) -> Array:
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


def _with_branches(table: FoldedTable, plan: Plan) -> FoldedTable:
    """The prior's positions with the plan's branches; weights are left to the fit."""
    guided = table.guided & ~np.isin(table.positions, list(plan.unguided))
    zero = np.zeros_like(table.conditional)
    return replace(table, guided=guided, conditional=zero, unconditional=zero)
