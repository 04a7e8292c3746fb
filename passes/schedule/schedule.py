"""Schedule: the fewest evaluations that keep the quality budget, fitted and searched on the compiled engine."""

from __future__ import annotations

from dataclasses import replace

from ...ir.program import Program, Schedule
from ...loop.errors import UsageError
from ..base import Context, Pass, PassResult, Phase
from .options import ScheduleOptions
from .search import ScheduleSearch


class SearchSchedule(Pass[ScheduleOptions]):
    """Choose which grid calls are evaluated and fit one linear update after each, in the closed loop.

    Positions are warped grids refined by moving single positions, scored on a few calibration samples; updates are
    fitted on all of them one after the other, then polished together; the budget is checked on validation samples. What
    it leaves over is spent on evaluations without the unconditional branch. The
    unfitted fold of the same positions and of evenly spaced ones (fewer steps of the sampler) stand beside every fit,
    and win when they are better.
    """

    name = "schedule"
    family = "schedule"
    phase = Phase.SCHEDULE
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
        """Fit one plan for every declared guidance scale."""
        assert program.loop is not None
        bound = context.engine(program)
        scales = program.loop.guidance.scales if program.loop.guidance else (None,)
        plans, details = {}, {}
        for scale in scales:
            search = ScheduleSearch(self.options, program, bound, context, scale)
            chosen = search.run()
            plans[1.0 if scale is None else scale] = chosen.plan
            details[str(scale)] = search.trials.record(chosen)
        schedule = Schedule(plans, context.fitted_on, details)
        return PassResult(replace(program, schedule=schedule), len(plans), details=details)
