"""The search for a schedule, on a denoiser in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from analytic import Counter, analytic_context, analytic_program, euler, loop

from stepfold.calibration.trajectories import trajectories
from stepfold.ir.program import Program
from stepfold.loop.metrics import psnr
from stepfold.loop.noise import SampleSet
from stepfold.loop.plan import Plan
from stepfold.passes.base import Context, PassResult
from stepfold.passes.schedule.fit import Fitter
from stepfold.passes.schedule.options import ScheduleOptions
from stepfold.passes.schedule.schedule import SearchSchedule
from stepfold.passes.schedule.search import ScheduleSearch
from stepfold.passes.schedule.trials import Candidate

STEPS = 12
QUICK = {"samples": 12, "search_samples": 8, "moves": 6}


def program_of(scale: Any = 2.0) -> Program:
    return analytic_program(euler(STEPS), loop(scale))


def search(cache: Path, engine: Counter | None = None, scale: Any = 2.0, seed: int = 0, **options: Any) -> PassResult:
    program = program_of(scale)
    context = analytic_context(program, cache, engine, seed=seed)
    operation = SearchSchedule(ScheduleOptions.model_validate(QUICK | options))
    operation.requires(program)
    return operation.run(program, context)


def plans(result: PassResult) -> dict[float, Plan]:
    assert result.program.schedule is not None
    return dict(result.program.schedule.fitted)


def quality(plan: Plan, cache: Path, name: str = "validation", engine: Counter | None = None) -> np.ndarray:
    """PSNR of a plan's samples against the full loop of the exact field."""
    program = program_of()
    data = trajectories(
        program, Counter().bound(), SampleSet(name, 0, 64), 2.0, cache, lambda done, total: None, whole=False
    )
    fitter = Fitter((engine or Counter()).bound(), loop(), euler(STEPS), 2.0, data)
    return psnr(fitter.samples(plan, data), data.latents[-1])


def refit(cache: Path, plan: Plan, engine: Counter, **options: Any) -> tuple[Candidate, bool]:
    program = program_of()
    context: Context = analytic_context(program, cache, engine)
    chosen = ScheduleOptions.model_validate(QUICK | options)
    return ScheduleSearch(chosen, program, engine.bound(), context, 2.0).refit(plan)
