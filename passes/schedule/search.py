"""Schedule: the fewest evaluations that keep the quality budget, fitted and searched on the compiled engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ...calibration.trajectories import Trajectories, first, trajectories
from ...ir.program import Program, Schedule
from ...loop.errors import GateError, UsageError
from ...loop.metrics import lower_bound, psnr
from ...loop.noise import SampleSet
from ...loop.ports import BoundProgram
from ...loop.table import FoldedTable, fold
from ..base import Context, Options, Pass, PassResult
from .fit import Fit, Fitter, Plan
from .polish import polish
from .positions import WARPS, Positions, moved, warped, without_one
from .terms import Terms

logger = logging.getLogger(__name__)

MINIMUM_VALIDATION = 64
"""A budget is met when the lower 95 % bound of the mean over at least so many validation samples meets it."""

KEPT_WARPS = 4
"""How many warps the first comparison of all of them leaves for other numbers of evaluations."""

POLISHED = 20
"""A longer table is not polished: the work grows with the square of the evaluations, and the gain shrinks."""

POLISH_REACH = 4.0
"""A fitted table that misses the budget by more dB than this is not polished; the step gains 1 to 2."""

RIVAL_DB = 0.5
"""Of two sets of positions, the one whose fit is worse by more is not polished: it hardly ever ends in front."""

LADDER = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 17, 20, 25, 30, 40, 50, 65, 80, 100)
"""Numbers of evaluations the search tries first."""


class ScheduleOptions(Options):
    """Options of `schedule`.

    Attributes:
        evaluations: denoiser calls in the table, or `auto` for the fewest that meet `min_psnr`.
        min_psnr: quality budget in dB against the full loop, on validation samples.
        samples: calibration samples the updates are fitted on.
        search_samples: how many of them score a candidate during the search.
        validation: samples that choose between schedules.
        outputs: newest guided outputs an update may weigh.
        directions: newest guidance directions an update may weigh beside them.
        moves: random moves of positions that are tried for one number of evaluations.
    """

    evaluations: int | Literal["auto"] = "auto"
    min_psnr: float | None = Field(default=40.0, gt=0)
    samples: int = Field(default=40, ge=4)
    search_samples: int = Field(default=16, ge=2)
    validation: int = Field(default=MINIMUM_VALIDATION, ge=MINIMUM_VALIDATION)
    outputs: int = Field(default=3, ge=1, le=8)
    directions: int = Field(default=2, ge=0, le=8)
    moves: int = Field(default=64, ge=0, le=10_000)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A table with its quality on the validation samples."""

    table: FoldedTable
    origin: str
    mean: float
    low: float
    calibration: float

    def row(self) -> dict[str, Any]:
        """For the record."""
        return {
            "origin": self.origin,
            "evaluations": self.table.evaluations,
            "positions": [int(p) for p in self.table.positions],
            "validation_psnr_db": round(self.mean, 3),
            "validation_low_db": round(self.low, 3),
            "calibration_psnr_db": round(self.calibration, 3),
        }


class SearchSchedule(Pass[ScheduleOptions]):
    """Choose which grid calls are evaluated and fit one linear update after each, in the closed loop.

    Positions are warped grids refined by moving single positions, scored on a few calibration samples; updates are
    fitted on all of them one after the other, then polished together; the budget is checked on validation samples. The
    unfitted fold of the same positions and of evenly spaced ones (fewer steps of the sampler) stand beside every fit,
    and win when they are better.
    """

    name = "schedule"
    family = "schedule"
    source = "stepfold; Bespoke Non-Stationary solvers, arXiv 2403.01329 (coefficients by gradient)"
    options_type = ScheduleOptions
    idempotent = False

    def not_applicable(self, program: Program) -> str | None:
        """A component has no loop to schedule."""
        return None if program.loop is not None else "the program has no loop"

    def requires(self, program: Program) -> None:
        """A number of evaluations must fit into the grid; `auto` needs a budget."""
        assert program.recurrence is not None
        wanted, calls = self.options.evaluations, program.recurrence.calls
        if wanted != "auto" and not 1 <= wanted <= calls:
            raise UsageError(f"schedule: evaluations must be 1 to {calls}, the calls of the sampler; received {wanted}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Fit one table for every declared guidance scale."""
        assert program.loop is not None
        bound = context.engine(program)
        scales = program.loop.guidance.scales if program.loop.guidance else (None,)
        tables, details = {}, {}
        for scale in scales:
            search = ScheduleSearch(self.options, program, bound, context, scale)
            chosen = search.run()
            tables[1.0 if scale is None else scale] = chosen.table
            details[str(scale)] = {"chosen": chosen.row(), "tried": [tried.row() for tried in search.tried]}
        schedule = Schedule(tables, context.fitted_on, details)
        return PassResult(replace(program, schedule=schedule), len(tables), details=details)


@dataclass
class ScheduleSearch:
    """The search for one guidance scale.

    Attributes:
        options: of the pass.
        program: its loop and sampler.
        bound: the program on the engine the updates are fitted on.
        context: of the pass.
        scale: guidance scale, None for a loop without guidance.
        tried: every candidate that was measured on the validation samples.
    """

    options: ScheduleOptions
    program: Program
    bound: BoundProgram
    context: Context
    scale: float | None
    tried: list[Candidate] = field(default_factory=list)

    def run(self) -> Candidate:
        """The table to ship.

        Raises:
            GateError: no table meets the budget.
        """
        self._prepare()
        return self._choose()

    def refit(self, table: FoldedTable) -> tuple[Candidate, bool]:
        """Fit the updates of a table again where it evaluates; search only when the budget is missed then.

        Returns:
            The table to ship, and whether it was searched for.

        Raises:
            GateError: no table meets the budget.
        """
        self._prepare()
        unguided = frozenset() if self.scale in (None, 1.0) else frozenset(table.positions[~table.guided].tolist())
        positions = tuple(table.positions.tolist())
        self._fitted(positions, unguided)
        self._polished(positions)
        self._unfitted(positions)
        self._measure(table, "as it was", float("nan"))
        best = max(self.tried, key=lambda candidate: candidate.mean)
        budget = None if self.options.evaluations != "auto" else self.context.min_psnr or self.options.min_psnr
        if budget is None or best.low >= budget:
            return best, False
        return self._choose(), True

    def _choose(self) -> Candidate:
        if self.options.evaluations != "auto":
            return self._best(self.options.evaluations)
        budget = self.context.min_psnr or self.options.min_psnr
        if budget is None:
            raise UsageError("schedule: evaluations `auto` needs a budget: set min_psnr or a number of evaluations.")
        return self._fewest(budget)

    def _prepare(self) -> None:
        options, context, loop = self.options, self.context, self.program.loop
        assert loop is not None and self.program.recurrence is not None
        self.recurrence = self.program.recurrence
        self.data = self._trajectories("calibration", options.samples, whole=True)
        self.validation = self._trajectories("validation", options.validation, whole=False)
        few = first(self.data, options.search_samples)
        self.quick = Fitter(self.bound, loop, self.recurrence, self.scale, few)
        self.full = Fitter(self.bound, loop, self.recurrence, self.scale, self.data)
        self.terms = Terms(options.outputs, options.directions if self.scale else 0)
        self.scores: dict[Positions, float] = {}
        self.fits: dict[Positions, tuple[Fit, Candidate]] = {}
        self.polished: set[Positions] = set()
        self.refined: dict[int, Positions] = {}
        self.warps = WARPS
        context.progress("searching schedules", 0, 1)

    def _trajectories(self, name: str, count: int, whole: bool) -> Trajectories:
        context = self.context
        samples = SampleSet(name, context.seed, count)
        return trajectories(
            context.original,
            context.reference(),
            samples,
            self.scale,
            context.cache,
            lambda done, total: context.progress(f"reference trajectories ({name})", done, total),
            whole=whole,
        )

    def _fewest(self, budget: float) -> Candidate:
        """The fewest evaluations that meet the budget: bisection over warped grids, then refinement of fewer."""
        rungs = [n for n in LADDER if n < self.recurrence.calls] + [self.recurrence.calls]
        low, high = 0, len(rungs) - 1
        best: Candidate | None = None
        middle = min(range(len(rungs)), key=lambda i: abs(rungs[i] - self.recurrence.calls // 5))
        while low <= high:
            candidate = self._coarse(rungs[middle])
            if candidate.low >= budget:
                best, high = candidate, middle - 1
            else:
                low = middle + 1
            middle = (low + high) // 2
        if best is None:
            best = self._best(self.recurrence.calls)
            if best.low < budget:
                raise self._missed(budget)
        while best.table.evaluations > 1:
            candidate = self._best(best.table.evaluations - 1, budget)
            if candidate.low < budget:
                break
            best = candidate
        return self._best(best.table.evaluations)

    def _missed(self, budget: float) -> GateError:
        reached = max(self.tried, key=lambda candidate: candidate.low)
        return GateError(
            f"schedule: no schedule reaches {budget:g} dB; the best was {reached.low:.2f} dB (lower 95 % bound of "
            f"the mean over {self.options.validation} validation samples) with {reached.table.evaluations} of "
            f"{self.recurrence.calls} evaluations. Lower min_psnr, or use a recipe of higher precision."
        )

    def _coarse(self, evaluations: int) -> Candidate:
        """The best warped grid, fitted."""
        return self._fitted(self._best_warp(evaluations))

    def _best(self, evaluations: int, budget: float | None = None) -> Candidate:
        """The best table with so many evaluations on the validation samples.

        Refined positions are fitted and polished; what was tried with so many before, and the unfitted folds, stand
        beside them. With a budget, the polish is left out where it is met without or is too far away.
        """
        coarse = self._best_warp(evaluations)
        even = warped(self.recurrence.calls, evaluations, 1.0, 1.0)
        more = self.refined.get(evaluations + 1, ())
        start = max([coarse, even, *without_one(more)], key=self._score)
        self.refined[evaluations] = self._refine(start)
        candidates = list(dict.fromkeys((self.refined[evaluations], coarse)))
        fits = {positions: self._fitted(positions) for positions in candidates}
        best = max(fits.values(), key=lambda candidate: candidate.mean)
        if budget is None or 0 < budget - best.low < POLISH_REACH:
            for positions, fit in fits.items():
                if fit.mean > best.mean - RIVAL_DB:
                    self._polished(positions)
        self._unfitted(even)
        same = [candidate for candidate in self.tried if candidate.table.evaluations == evaluations]
        return max(same, key=lambda candidate: candidate.mean)

    def _unfitted(self, positions: Positions) -> None:
        """The sampler's own updates between these positions."""
        for origin, order in (("fewer steps", 0), ("forecast", 1)):
            self._measure(fold(self.recurrence, self.scale, positions, order), origin, float("nan"))

    def _fitted(self, positions: Positions, unguided: frozenset[int] = frozenset()) -> Candidate:
        """The sequential fit of these positions; each is fitted once."""
        if positions not in self.fits:
            fit = self.full.fit(Plan(positions, unguided), self.terms)
            self.fits[positions] = fit, self._measure(fit.table, "fitted", self._calibration(fit))
        return self.fits[positions][1]

    def _polished(self, positions: Positions) -> None:
        """Polish a fit, once."""
        if len(positions) > POLISHED or positions in self.polished:
            return
        self.polished.add(positions)
        fit, _ = self.fits[positions]
        task = f"polishing {len(positions)} evaluations"
        better = polish(self.full, fit, self.terms, lambda done, total: self.context.progress(task, done, total))
        if better is not fit:
            self._measure(better.table, "polished", self._calibration(better))

    def _calibration(self, fit: Fit) -> float:
        return float(psnr(fit.samples, self.data.latents[-1]).mean())

    def _best_warp(self, evaluations: int) -> Positions:
        """The best warped grid; once all warps were compared, only the ones that were good then are tried."""
        calls = self.recurrence.calls
        grids = {warped(calls, evaluations, a, b): (a, b) for a, b in self.warps}
        ranked = sorted(grids, key=self._score, reverse=True)
        if len(self.warps) > KEPT_WARPS and evaluations < calls:
            self.warps = tuple(grids[positions] for positions in ranked[:KEPT_WARPS])
        return ranked[0]

    def _refine(self, positions: Positions) -> Positions:
        """Accept random moves that improve the closed loop on the search samples; seeded, so deterministic."""
        calls, moves = self.recurrence.calls, self.options.moves
        if len(positions) in (1, calls):
            return positions
        generator = np.random.default_rng([self.context.seed, len(positions)])
        for move in range(moves):
            proposal = moved(positions, calls, generator)
            if self._score(proposal) > self._score(positions):
                positions = proposal
            self.context.progress(f"searching {len(positions)} evaluations", move + 1, moves)
        return positions

    def _score(self, positions: Positions) -> float:
        """Mean PSNR of the closed-loop fit on the search samples."""
        if positions not in self.scores:
            fit = self.quick.fit(Plan(positions), self.terms)
            self.scores[positions] = float(psnr(fit.samples, self.quick.data.latents[-1]).mean())
        return self.scores[positions]

    def _measure(self, table: FoldedTable, origin: str, calibration: float) -> Candidate:
        """Quality on the validation samples, for the record; a table that was measured before is not run again."""
        for known in self.tried:
            if known.origin == origin and np.array_equal(known.table.positions, table.positions):
                return known
        values = psnr(self.full.samples(table, self.validation), self.validation.latents[-1])
        candidate = Candidate(table, origin, float(values.mean()), lower_bound(values), calibration)
        self.tried.append(candidate)
        logger.info("%d evaluations, %s: %.2f dB on validation", table.evaluations, origin, candidate.mean)
        return candidate
