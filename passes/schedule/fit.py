"""Fit the updates of a schedule, sequentially and in the closed loop.

Start from the calibration noise, evaluate at the first position, solve a small least-squares problem for the update
that best reaches the reference trajectory at the next position, apply it, go on from *there*. Each fit absorbs the
error made before it, and the error of the engine that is being fitted (Bespoke Non-Stationary solvers,
arXiv 2403.01329, without gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

import numpy as np

from ...calibration.trajectories import Trajectories
from ...loop.driver import LoopRun, run_loop
from ...loop.metrics import sample_psnr
from ...loop.plan import Plan, Update, fold, guides
from ...loop.ports import BoundProgram
from ...loop.recurrence import Array, Recurrence
from ...loop.spec import LoopSpec
from .methods import METHODS
from .methods.method import Normal, Seen
from .outline import Outline, fillable
from .terms import Term, Terms, basis, forget, prior_weights, update_of

RIDGE = 1e-7
"""Ridge of the least squares, relative to the mean square of the terms; pulls towards the unfitted update."""

REACH = max(method.reach for method in METHODS.values())


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
            mine == other and self.outline.at(mine) == outline.at(other)
            for mine, other in zip(self.outline.positions, outline.positions, strict=False)
        )
        return sum(1 for _ in takewhile(bool, alike))


class Fitter:
    """Fits outlines on one engine, one guidance scale and one set of reference trajectories.

    Attributes:
        psnr: how samples [B, ...] are compared with those of the full loop: [B] dB.
    """

    def __init__(
        self, bound: BoundProgram, loop: LoopSpec, recurrence: Recurrence, scale: float | None, data: Trajectories
    ):
        """Fit with the outputs of `bound` against the latents of `data`."""
        self.bound, self.loop, self.recurrence, self.scale, self.data = bound, loop, recurrence, scale, data
        self.psnr = sample_psnr(loop.latent.kind)
        self._slots = [slot.name for slot in fillable(bound.computing)]

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
        plan = self._plan(prior, outline)
        N, known = plan.evaluations, 0 if like is None else like.shared(outline)
        runs = self.runs(plan, keep=REACH if self._slots else 0)
        first = max(0, known - 1)  # the update after the last evaluation that both have aims elsewhere
        updates: list[Update] = []
        if like is not None and known:
            before = like.fit.plan
            updates = [_of_length(before.update(k), N) for k in range(first)]
            plan = _reweighed(plan, {name: cell.weights[:known, :known] for name, cell in before.cells.items()})
            for run, stand in zip(runs, like.stands[first], strict=True):
                run.stand_where(stand)
        for k in range(first, N):
            if k >= known:
                plan = self._weighed(runs, plan, outline, k)
                for run in runs:
                    run.evaluate(k)
            keep(runs)
            target = self.data.latents[plan.landings[k]]
            chosen = basis(k, plan.guided, terms)
            weights = self._solve(runs, chosen, target, prior, k)
            updates.append(update_of(chosen, weights, plan))
            for run in runs:
                run.update(k, updates[k])
                forget(run, k, plan.guided, terms)
        cells = {name: cell for name, cell in plan.cells.items() if cell.variant.any()}
        fitted = replace(plan.with_updates(updates), cells=cells)
        return Fit(fitted, np.concatenate([run.latent for run in runs]))

    def _plan(self, prior: Plan, outline: Outline) -> Plan:
        """The prior's positions with the outline's branches and cells; weights are left to the fit."""
        guided = self.guided(outline)
        zero = np.zeros_like(prior.conditional)
        cells = outline.cells(self._slots, guided)
        return replace(prior, guided=guided, conditional=zero, unconditional=zero, cells=cells)

    def guided(self, outline: Outline) -> Array:
        """[N] whether both guidance branches run at each evaluation of an outline: where the loop guides at all."""
        scales = self.recurrence.scales(self.scale if guides(self.scale) else None)
        return np.asarray([scales[one] > 1.0 and one not in outline.unguided for one in outline.positions], bool)

    def _weighed(self, runs: Sequence[LoopRun], plan: Plan, outline: Outline, k: int) -> Plan:
        """The plan with the weights of what evaluation k does not compute; the runs follow it.

        Slots are taken in order, so that each method sees what the slots before leave to it.
        """
        for name in plan.cells:
            method = METHODS.get(outline.reused(name).get(k, ""))
            if method is not None:
                anchors = outline.anchors(name, plan.guided, k, method.reach)
                normal = partial(_normal, runs, name, k, anchors)
                seen = Seen(int(plan.positions[k]), plan.positions[anchors], normal)
                weights = np.zeros((1, plan.evaluations))
                weights[0, anchors] = method.weights(seen)
                plan = _reweighed(plan, {name: weights}, k)
                for run in runs:
                    run.follow(plan)
        return plan

    def runs(self, plan: Plan, keep: int = 0) -> list[LoopRun]:
        """The samples of the data at the start of a plan's loop, in batches; `keep` as `LoopRun` takes it."""
        return [LoopRun(self.bound, self.loop, piece, plan, keep) for piece in self.data.pieces]

    def samples(self, plan: Plan, data: Trajectories | None = None) -> Array:
        """The samples a plan makes from the noise of `data`."""
        pieces = (data or self.data).pieces
        return np.concatenate([run_loop(self.bound, self.loop, piece, plan) for piece in pieces])

    def _solve(self, runs: Sequence[LoopRun], chosen: list[Term], target: Array, prior: Plan, k: int) -> Array:
        """Ridge least squares over all samples, in float64: minimize |terms w - target|^2 + ridge |w - w0|^2."""
        m = len(chosen)
        gram, right, start = np.zeros((m, m)), np.zeros(m), 0
        for run in runs:
            columns = [term.value(run, prior).ravel().astype(np.float64) for term in chosen]
            aim, added = target[start : start + run.batch], run.added(k)
            goal = (aim if added is None else aim - added).ravel().astype(np.float64)
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


def _of_length(update: Update, evaluations: int) -> Update:
    """An update for a plan of another number of evaluations, of which it weighs those that both plans have."""

    def cut(weights: Array) -> Array:
        return np.resize(np.append(weights, np.zeros(evaluations)), evaluations)

    predicted = None if update.predicted is None else cut(update.predicted)
    return Update(update.state, cut(update.conditional), cut(update.unconditional), predicted)


def _reweighed(plan: Plan, weights: Mapping[str, Array], start: int = 0) -> Plan:
    """The plan with other weights of its cells in the rows from `start` on, one for each row [m, up to N] that is given."""
    cells = dict(plan.cells)
    for name, rows in weights.items():
        changed = cells[name].weights.copy()
        changed[start : start + len(rows), : rows.shape[1]] = rows
        cells[name] = replace(cells[name], weights=changed)
    return replace(plan, cells=cells)


def _normal(runs: Sequence[LoopRun], name: str, k: int, anchors: Sequence[int]) -> Normal:
    """Normal equations of a slot at evaluation k; each of its outputs counts by its own mean square."""
    m = len(anchors)
    sums: dict[int, Array] = {}  # output -> inner products [m + 1, m + 1] of the anchors and the target
    for run in runs:
        target = run.computed(name, k)
        for i, wanted in enumerate(target):
            known = [run.outputs(name)[j][i][: len(wanted)] for j in anchors]
            columns = np.stack([one.ravel() for one in (*known, wanted)]).astype(np.float64)
            sums[i] = sums.get(i, 0) + columns @ columns.T
    total = sum((one / max(one[m, m], 1e-30) for one in sums.values()), np.zeros((m + 1, m + 1)))
    return Normal(total[:m, :m], total[:m, m])
