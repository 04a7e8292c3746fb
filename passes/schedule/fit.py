"""Fit the updates of a schedule, sequentially and in the closed loop.

Start from the calibration noise, evaluate at the first position, solve a small least-squares problem for the update
that best reaches the reference trajectory at the next position, apply it, go on from *there*. Each fit absorbs the
error made before it, and the error of the engine that is being fitted (Bespoke Non-Stationary solvers,
arXiv 2403.01329, without gradients).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...calibration.trajectories import BATCH, Trajectories, slices
from ...loop.driver import LoopRun, run_loop
from ...loop.ports import BoundProgram
from ...loop.recurrence import Array, Recurrence
from ...loop.spec import LoopSpec
from ...loop.table import FoldedTable, fold

RIDGE = 1e-7
"""Ridge of the least squares, relative to the mean square of the terms; pulls towards the unfitted update."""


@dataclass(frozen=True)
class Terms:
    """What an update may weigh beside the latent: the newest guided outputs and guidance directions (c - u)."""

    outputs: int = 3
    directions: int = 0


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


class Fitter:
    """Fits plans on one engine, one guidance scale and one set of reference trajectories."""

    def __init__(
        self, bound: BoundProgram, loop: LoopSpec, recurrence: Recurrence, scale: float | None, data: Trajectories
    ):
        """Fit with the outputs of `bound` against the latents of `data`."""
        self.bound, self.loop, self.recurrence, self.scale, self.data = bound, loop, recurrence, scale, data

    def fit(self, plan: Plan, terms: Terms) -> Fit:
        """Solve for every update of a plan, one after the other, in the closed loop."""
        prior = fold(self.recurrence, self.scale, plan.positions, order=1)
        table = _with_branches(prior, plan)
        N = table.evaluations
        runs = [LoopRun(self.bound, self.loop, piece, table) for piece in slices(self.data.request, BATCH)]
        state, conditional, unconditional = np.ones(N), np.zeros((N, N)), np.zeros((N, N))
        for k in range(N):
            for run in runs:
                run.evaluate(k)
            target = self.data.latents[table.landings[k]]
            basis = _basis(k, table.guided, terms)
            weights = self._solve(runs, basis, target, prior, k)
            state[k], conditional[k], unconditional[k] = _expand(basis, weights, table.guided, self.scale)
            for run in runs:
                run.update(state[k], conditional[k], unconditional[k])
                if not plan.unguided:  # with them a direction of any age may still be needed
                    run.forget(k - max(terms.outputs, terms.directions))
        fitted = FoldedTable(
            table.positions,
            table.timesteps,
            table.input_scale,
            table.guided,
            state,
            conditional,
            unconditional,
            table.initial_scale,
            table.landings,
        )
        return Fit(fitted, np.concatenate([run.latent for run in runs]))

    def samples(self, table: FoldedTable, data: Trajectories | None = None) -> Array:
        """The samples a table makes from the noise of `data`."""
        request = (data or self.data).request
        return np.concatenate([run_loop(self.bound, self.loop, piece, table) for piece in slices(request, BATCH)])

    def _solve(self, runs: Sequence[LoopRun], basis: list[Term], target: Array, prior: FoldedTable, k: int) -> Array:
        """Ridge least squares over all samples, in float64: minimize |basis w - target|^2 + ridge |w - w0|^2."""
        m = len(basis)
        gram, right, start = np.zeros((m, m)), np.zeros(m), 0
        for run in runs:
            columns = [_value(run, term, self.scale).ravel().astype(np.float64) for term in basis]
            goal = target[start : start + run.batch].ravel().astype(np.float64)
            start += run.batch
            gram += np.asarray([[a @ b for b in columns] for a in columns])
            right += np.asarray([a @ goal for a in columns])
        start_weights = _prior_weights(basis, prior, k, self.scale)
        if not (np.isfinite(gram).all() and np.isfinite(right).all()):
            return start_weights  # the trajectory has left the range of numbers; nothing can be learned from it
        scale = np.sqrt(np.maximum(np.diag(gram), 1e-30))
        normalized = gram / np.outer(scale, scale)
        residual = right / scale - normalized @ (start_weights * scale)
        return start_weights + np.linalg.solve(normalized + RIDGE * np.eye(m), residual) / scale


@dataclass(frozen=True)
class Term:
    """One value an update weighs: the latent, the guided output of evaluation j, or its guidance direction."""

    kind: str
    evaluation: int = -1


def _basis(k: int, guided: Array, terms: Terms) -> list[Term]:
    basis = [Term("latent")]
    basis += [Term("output", j) for j in range(k, max(-1, k - terms.outputs), -1)]
    recent = [j for j in range(k, -1, -1) if guided[j]]
    missing = 0 if guided[k] else 1  # an unguided output needs a direction from an earlier evaluation
    basis += [Term("direction", j) for j in recent[: max(terms.directions, missing)]]
    return basis


def _value(run: LoopRun, term: Term, scale: float | None) -> Array:
    if term.kind == "latent":
        return run.latent
    c, u = run.history[term.evaluation]
    if term.kind == "direction":
        assert u is not None
        return c - u
    return c if u is None or scale is None else u + np.float32(scale) * (c - u)


def _expand(basis: list[Term], weights: Array, guided: Array, scale: float | None) -> tuple[float, Array, Array]:
    """Weights of terms -> state, conditional [N] and unconditional [N] weights of one table row."""
    state, conditional, unconditional = 0.0, np.zeros(len(guided)), np.zeros(len(guided))
    for term, weight in zip(basis, weights, strict=True):
        if term.kind == "latent":
            state = float(weight)
        elif term.kind == "direction":
            conditional[term.evaluation] += weight
            unconditional[term.evaluation] -= weight
        else:
            factor = scale if scale is not None and guided[term.evaluation] else 1.0
            conditional[term.evaluation] += factor * weight
            unconditional[term.evaluation] += (1.0 - factor) * weight
    return state, conditional, unconditional


def _prior_weights(basis: list[Term], prior: FoldedTable, k: int, scale: float | None) -> Array:
    """The unfitted update in the basis: its weights of guided outputs."""
    factor = 1.0 if scale is None else scale
    values = {"latent": prior.state[k], "direction": 0.0}
    return np.asarray(
        [prior.conditional[k, t.evaluation] / factor if t.kind == "output" else values[t.kind] for t in basis]
    )


def _with_branches(table: FoldedTable, plan: Plan) -> FoldedTable:
    """The prior's positions with the plan's branches; weights are left to the fit."""
    guided = table.guided & ~np.isin(table.positions, list(plan.unguided))
    zero = np.zeros_like(table.conditional)
    return FoldedTable(
        table.positions,
        table.timesteps,
        table.input_scale,
        guided,
        table.state,
        zero,
        zero,
        table.initial_scale,
        table.landings,
    )
