"""Searching again: the same for a seed, and fitting the schedule of another engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from analytic import Counter, analytic_context, euler
from searching import QUICK, STEPS, plans, program_of, quality, refit, search

from stepfold.loop.plan import fold
from stepfold.passes.schedule.fit import Fitter
from stepfold.passes.schedule.options import ScheduleOptions
from stepfold.passes.schedule.schedule import SearchSchedule
from stepfold.passes.schedule.search import ScheduleSearch

# -- the same again


def test_deterministic_for_a_seed(cache: Path, tmp_path: Path) -> None:
    """With trajectories read from the cache or made anew."""
    results = [search(folder, min_psnr=35.0) for folder in (cache, tmp_path)]
    first, second = (plans(result)[2.0] for result in results)
    for name, value in first.arrays().items():
        np.testing.assert_array_equal(value, second.arrays()[name], err_msg=name)
    assert repr(results[0].details) == repr(results[1].details)  # NaN is not equal to itself


def test_the_moves_are_those_of_the_seed(cache: Path) -> None:
    """The same candidates in the same order."""

    def scored(seed: int) -> list[tuple[int, ...]]:
        program = program_of()
        context = analytic_context(program, cache, seed=seed)
        options = ScheduleOptions.model_validate(QUICK | {"evaluations": 6})
        one = ScheduleSearch(options, program, Counter().bound(), context, 2.0)
        one.run()
        return [outline.positions for outline in one.trials.scores]

    assert scored(0) == scored(0) != scored(1)


def test_another_seed_has_other_samples(cache: Path) -> None:
    first, second = (plans(search(cache, evaluations=4, seed=seed))[2.0] for seed in (0, 1))
    assert (first.conditional != second.conditional).any()


def test_progress_is_told(cache: Path) -> None:
    told: list[tuple[str, int, int]] = []
    program = program_of()
    context = analytic_context(program, cache, progress=lambda *report: told.append(report))
    SearchSchedule(ScheduleOptions.model_validate(QUICK | {"evaluations": 4})).run(program, context)
    assert any("searching" in task for task, _, _ in told)
    assert all(0 <= done <= total for _, done, total in told)


# -- fitting again


def test_refit_keeps_the_positions_while_the_budget_is_met(cache: Path) -> None:
    (plan,) = plans(search(cache, min_psnr=35.0)).values()
    candidate, searched = refit(cache, plan, Counter(gain=0.95), min_psnr=35.0)
    assert not searched and candidate.psnr.low >= 35.0
    np.testing.assert_array_equal(candidate.plan.positions, plan.positions)
    assert (candidate.plan.conditional != plan.conditional).any()
    before = quality(plan, cache, engine=Counter(gain=0.95))
    assert candidate.psnr.mean > before.mean()


def test_refit_searches_when_the_budget_is_missed(cache: Path) -> None:
    (plan,) = plans(search(cache, evaluations=2)).values()
    candidate, searched = refit(cache, plan, Counter(), min_psnr=60.0)
    assert searched and candidate.psnr.low >= 60.0 and candidate.plan.evaluations > 2


def test_refit_of_a_number_of_evaluations_has_no_budget(cache: Path) -> None:
    (plan,) = plans(search(cache, evaluations=2)).values()
    candidate, searched = refit(cache, plan, Counter(), evaluations=2, min_psnr=90.0)
    assert not searched and candidate.plan.evaluations == 2


def test_refit_keeps_a_table_that_is_better(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plan,) = plans(search(cache, evaluations=6)).values()
    fit = Fitter.fit
    monkeypatch.setattr(
        Fitter,
        "fit",
        lambda self, outline, terms: replace(
            fit(self, outline, terms), plan=fold(euler(STEPS), 2.0, outline.positions)
        ),
    )
    candidate, _ = refit(cache, plan, Counter(), evaluations=6)
    assert candidate.origin == "as it was" and candidate.plan is plan
