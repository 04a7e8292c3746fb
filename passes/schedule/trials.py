"""What the search tries: outlines fitted on one engine, scored on a few samples, measured on those that choose."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...calibration.trajectories import Trajectories, first, trajectories
from ...ir.program import Program
from ...loop.budget import PsnrFigures, QualityBudget
from ...loop.noise import SampleSet
from ...loop.plan import Plan, fold, guides
from ...loop.ports import BoundProgram, BoundSlot
from ...loop.recurrence import Array
from ..base import Context
from .costs import Costs
from .fit import Fit, Fitter, Trace
from .options import ScheduleOptions
from .outline import Outline, fillable
from .polish import polish
from .positions import Positions
from .terms import Terms

logger = logging.getLogger(__name__)

POLISHED = 20
"""A longer plan is not polished: the work grows with the square of the evaluations, and the gain shrinks."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan with its quality.

    Attributes:
        plan: the plan.
        origin: how it was made.
        psnr: figures of the validation samples.
        calibration: mean PSNR in dB of the calibration samples; NaN for a plan that was not fitted on any.
    """

    plan: Plan
    origin: str
    psnr: PsnrFigures
    calibration: float

    @property
    def thinned(self) -> bool:
        """Whether some evaluations leave out a branch that the loop has there, or do not compute everything."""
        return bool(self.plan.cells or ((self.plan.scales > 1.0) & ~self.plan.guided).any())

    def cheap_like(self, plan: Plan) -> bool:
        """Whether it costs what another plan does: the same branches, and the same cells."""
        return np.array_equal(self.plan.guided, plan.guided) and same_cells(self.plan, plan)

    def row(self) -> dict[str, Any]:
        """For the record."""
        return {
            "origin": self.origin,
            "evaluations": self.plan.evaluations,
            "positions": [int(p) for p in self.plan.positions],
            "unguided": [int(p) for p in self.plan.positions[~self.plan.guided]],
            **({"reused": _reused(self.plan)} if self.plan.cells else {}),
            "validation_psnr_db": round(self.psnr.mean, 3),
            "validation_low_db": round(self.psnr.low, 3),
            "validation_p05_db": round(self.psnr.p05, 3),
            "calibration_psnr_db": round(self.calibration, 3),
        }


def same_cells(one: Plan, other: Plan) -> bool:
    """Whether two plans fill their slots alike."""
    return one.cells.keys() == other.cells.keys() and all(
        np.array_equal(cell.variant, other.cells[name].variant) for name, cell in one.cells.items()
    )


def _reused(plan: Plan) -> dict[str, list[int]]:
    """The positions at which something else than the original fills each slot."""
    return {name: [int(p) for p in plan.positions[cell.variant != 0]] for name, cell in plan.cells.items()}


def choice(candidates: Iterable[Candidate], budget: QualityBudget | None) -> Candidate:
    """The best mean of those that meet the budget; where none meets it, the one that comes nearest.

    A budget is met by the lower bound of the mean and by the tail, so the candidate with the best mean may be one that
    misses it.
    """
    listed = list(candidates)
    met = [one for one in listed if budget is None or budget.met_by(one.psnr)]
    if budget is None or met:
        return max(met, key=lambda one: one.psnr.mean)
    return min(listed, key=lambda one: budget.shortfall(one.psnr))


class Trials:
    """Outlines that were scored, fitted, polished and measured for one guidance scale; each is tried once.

    Attributes:
        recurrence: the sampler.
        tried: every candidate that was measured on the validation samples.
        scores: scores of outlines on the search samples, in the order in which they were asked for.
    """

    def __init__(
        self, options: ScheduleOptions, program: Program, bound: BoundProgram, context: Context, scale: float | None
    ):
        """Run the reference along all the samples that are needed, or take it from the cache."""
        assert program.loop is not None and program.recurrence is not None
        self.recurrence = program.recurrence
        self.tried: list[Candidate] = []
        self.scores: dict[Outline, float] = {}
        self._context, self._scale = context, scale
        self._data = self._trajectories("calibration", options.samples, whole=True)
        self._validation = self._trajectories("validation", options.validation, whole=False)
        few = first(self._data, options.search_samples)
        self._quick = Fitter(bound, program.loop, self.recurrence, scale, few)
        self._full = Fitter(bound, program.loop, self.recurrence, scale, self._data)
        self._terms = Terms(
            options.outputs,
            directions=options.directions if guides(scale) else 0,
            predictions=options.outputs if self.recurrence.prediction is not None else 0,
        )
        self._fits: dict[Outline, tuple[Fit, Candidate]] = {}
        self._polished: dict[Outline, Candidate] = {}
        self._images: dict[Candidate, PsnrFigures] = {}
        self._model: Trace | None = None

    def guided(self, outline: Outline) -> Array:
        """[N] whether both guidance branches run at each evaluation of an outline."""
        return self._full.guided(outline)

    @property
    def computing(self) -> tuple[BoundSlot, ...]:
        """The slots that a plan fills at each evaluation."""
        return self._full.bound.computing

    def costs(self) -> Costs:
        """What evaluations cost: measured where they may be filled in several ways, their branches counted elsewhere."""
        fitter = self._full
        if not fillable(self.computing):
            return Costs.counted(self.computing)
        plan = fold(self.recurrence, self._scale)
        return Costs.measured(fitter.bound, fitter.loop, fitter.data.pieces[0], plan)

    def score(self, outline: Outline) -> float:
        """Mean PSNR of the closed-loop fit on the search samples."""
        if outline not in self.scores:
            trace = self._quick.traced(outline, self._terms, self._model)
            self.scores[outline] = float(self._quick.psnr(trace.fit.samples, self._quick.data.latents[-1]).mean())
            if not (outline.unguided or outline.fills) and self._is_model(outline):
                self._model = trace
        return self.scores[outline]

    def _is_model(self, outline: Outline) -> bool:
        """Whether outlines to come are likely to begin like this one: it is the best so far of its length."""
        model = self._model
        if model is None or len(model.outline.positions) != len(outline.positions):
            return True
        return self.scores[outline] > self.scores[model.outline]

    def fitted(self, outline: Outline) -> Candidate:
        """The sequential fit of an outline on all calibration samples."""
        if outline not in self._fits:
            fit = self._full.fit(outline, self._terms)
            self._fits[outline] = fit, self.measure(fit.plan, "fitted", self._calibration(fit))
        return self._fits[outline][1]

    def polished(self, outline: Outline) -> Candidate:
        """The polish of a fit; the fit itself where it is too long for one, or where no step improves it."""
        if outline not in self._polished:
            candidate = self.fitted(outline)
            fit, _ = self._fits[outline]
            if len(outline.positions) <= POLISHED:
                task = f"polishing {len(outline.positions)} evaluations"
                better = polish(self._full, fit, self._terms, lambda done, n: self._context.progress(task, done, n))
                if better is not fit:
                    candidate = self.measure(better.plan, "polished", self._calibration(better))
            self._polished[outline] = candidate
        return self._polished[outline]

    def unfitted(self, positions: Positions) -> None:
        """Measure the sampler's own updates between these positions."""
        for origin, order in (("fewer steps", 0), ("forecast", 1)):
            self.measure(fold(self.recurrence, self._scale, positions, order), origin)

    def measure(self, plan: Plan, origin: str, calibration: float = float("nan")) -> Candidate:
        """Quality on the validation samples, for the record; a plan that was measured before is not run again."""
        for known in self.tried:
            if known.origin == origin and known.plan.same_as(plan):
                return known
        values = self._full.psnr(self._full.samples(plan, self._validation), self._validation.latents[-1])
        candidate = Candidate(plan, origin, PsnrFigures.of(values), calibration)
        self.tried.append(candidate)
        logger.info("%d evaluations, %s: %.2f dB on validation", plan.evaluations, origin, candidate.psnr.mean)
        return candidate

    def judged(self, candidate: Candidate) -> PsnrFigures:
        """What a budget is about: images of the validation samples; the samples where nothing decodes them."""
        if self._context.decoded is None:
            return candidate.psnr
        if candidate not in self._images:
            latents = self._full.samples(candidate.plan, self._validation)
            found = PsnrFigures.of(self._context.decoded(latents, self._validation.latents[-1]))
            logger.info("%d evaluations: %.2f dB of images on validation", candidate.plan.evaluations, found.mean)
            self._images[candidate] = found
        return self._images[candidate]

    @property
    def images(self) -> Mapping[Candidate, PsnrFigures]:
        """The candidates whose images were compared."""
        return self._images

    def record(self, chosen: Candidate) -> dict[str, Any]:
        """What is told of a search: the candidate that was chosen, and all that were tried."""
        return {"chosen": self._row(chosen), "tried": [self._row(one) for one in self.tried]}

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        images = self._images.get(candidate)
        if images is None:
            return candidate.row()
        figures = {"mean": images.mean, "low": images.low, "p05": images.p05}
        return {**candidate.row(), "validation_images_db": {name: round(value, 3) for name, value in figures.items()}}

    def _calibration(self, fit: Fit) -> float:
        return float(self._full.psnr(fit.samples, self._data.latents[-1]).mean())

    def _trajectories(self, name: str, count: int, whole: bool) -> Trajectories:
        context = self._context
        return trajectories(
            context.original,
            context.reference(),
            SampleSet(name, context.seed, count),
            self._scale,
            context.cache,
            lambda done, total: context.progress(f"reference trajectories ({name})", done, total),
            whole=whole,
        )
