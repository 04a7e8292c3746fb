"""The search for a schedule, on a denoiser in closed form."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import Counter, analytic_context, analytic_program, euler, loop
from programs import component

from stepfold.calibration.trajectories import trajectories
from stepfold.ir.program import Program
from stepfold.loop.errors import GateError, UsageError
from stepfold.loop.metrics import lower_bound, psnr
from stepfold.loop.noise import SampleSet
from stepfold.loop.table import FoldedTable, fold
from stepfold.passes.base import Context, PassResult
from stepfold.passes.schedule.fit import Fitter
from stepfold.passes.schedule.options import ScheduleOptions
from stepfold.passes.schedule.schedule import SearchSchedule
from stepfold.passes.schedule.search import ScheduleSearch
from stepfold.passes.schedule.trials import Candidate

STEPS = 12
QUICK = {"samples": 12, "search_samples": 8, "moves": 6}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference trajectories, shared: their key has everything they depend on."""
    return tmp_path_factory.mktemp("cache")


def program_of(scale: Any = 2.0) -> Program:
    return analytic_program(euler(STEPS), loop(scale))


def search(cache: Path, engine: Counter | None = None, scale: Any = 2.0, seed: int = 0, **options: Any) -> PassResult:
    program = program_of(scale)
    context = analytic_context(program, cache, engine, seed=seed)
    operation = SearchSchedule(ScheduleOptions.model_validate(QUICK | options))
    operation.requires(program)
    return operation.run(program, context)


def tables(result: PassResult) -> dict[float, FoldedTable]:
    assert result.program.schedule is not None
    return dict(result.program.schedule.fitted)


def quality(table: FoldedTable, cache: Path, name: str = "validation", engine: Counter | None = None) -> np.ndarray:
    """PSNR of a table's samples against the full loop of the exact field."""
    program = program_of()
    data = trajectories(
        program, Counter().bound(), SampleSet(name, 0, 64), 2.0, cache, lambda done, total: None, whole=False
    )
    fitter = Fitter((engine or Counter()).bound(), loop(), euler(STEPS), 2.0, data)
    return psnr(fitter.samples(table, data), data.latents[-1])


# -- a budget


@pytest.mark.parametrize("budget", [float(budget) for budget in range(22, 54, 2)])
def test_the_budget_is_met_by_the_lower_bound(cache: Path, budget: float) -> None:
    """Some of these lie between the bound and the mean of a candidate."""
    result = search(cache, min_psnr=budget)
    (table,) = tables(result).values()
    values = quality(table, cache)
    assert lower_bound(values) >= budget
    assert quality(table, cache, "held-out").mean() > budget - 3
    chosen = result.details["2.0"]["chosen"]
    assert chosen["validation_low_db"] == pytest.approx(lower_bound(values), abs=1e-3)
    assert chosen["validation_psnr_db"] == pytest.approx(values.mean(), abs=1e-3)


def test_a_harder_budget_costs_more_evaluations(cache: Path) -> None:
    easy, hard = (search(cache, min_psnr=budget) for budget in (25.0, 45.0))
    evaluations = [next(iter(tables(result).values())).evaluations for result in (easy, hard)]
    assert evaluations[0] < evaluations[1] < STEPS


def test_one_evaluation_fewer_misses_the_budget(cache: Path) -> None:
    """The table that is shipped is the last that was good enough."""
    result = search(cache, min_psnr=40.0)
    (table,) = tables(result).values()
    fewer = [row for row in result.details["2.0"]["tried"] if row["evaluations"] == table.evaluations - 1]
    assert fewer and all(row["validation_low_db"] < 40.0 for row in fewer)


def test_a_budget_that_cannot_be_met(cache: Path) -> None:
    """The engine is wrong by a fifth of its gain and a constant cannot make up for it at 120 dB."""
    with pytest.raises(GateError) as caught:
        search(cache, engine=Crooked(), min_psnr=120.0)
    assert caught.value.exit_code == 3
    found = re.fullmatch(
        r"schedule: no schedule reaches 120 dB; the best was ([\d.]+) dB \(lower 95 % bound of the mean over 64 "
        r"validation samples\) with (\d+) of 12 evaluations\. Lower min_psnr, or use a recipe of higher precision\.",
        str(caught.value),
    )
    assert found and 20 < float(found[1]) < 120


class Crooked(Counter):
    """An engine whose error no linear update can take back."""

    def __call__(self, inputs: Any) -> list[np.ndarray]:
        (value,) = super().__call__(inputs)
        return [value + np.float32(0.02) * np.sign(value)]


def test_a_budget_of_the_user_wins_over_the_recipes(cache: Path) -> None:
    program = program_of()
    context = analytic_context(program, cache, min_psnr=25.0)
    strict = SearchSchedule(ScheduleOptions.model_validate({**QUICK, "min_psnr": 60.0})).run(program, context)
    (table,) = tables(strict).values()
    assert table.evaluations == next(iter(tables(search(cache, min_psnr=25.0)).values())).evaluations


def test_auto_needs_a_budget(cache: Path) -> None:
    with pytest.raises(UsageError, match="evaluations `auto` needs a budget: set min_psnr or a number of evaluations"):
        search(cache, min_psnr=None)


# -- a number of evaluations


@pytest.mark.parametrize("evaluations", [1, 2, 5, STEPS])
def test_a_fixed_number_of_evaluations(cache: Path, evaluations: int) -> None:
    """The budget is a reported figure then: 90 dB is not met, and no error."""
    result = search(cache, evaluations=evaluations, min_psnr=90.0)
    (table,) = tables(result).values()
    assert table.evaluations == evaluations
    assert result.details["2.0"]["chosen"]["evaluations"] == evaluations
    assert result.changed == 1


@pytest.mark.parametrize("evaluations", [0, 13, -1])
def test_evaluations_outside_the_grid(cache: Path, evaluations: int) -> None:
    with pytest.raises(
        UsageError, match=f"evaluations must be 1 to 12, the calls of the sampler; received {evaluations}"
    ):
        search(cache, evaluations=evaluations)


def test_every_call_is_the_full_loop(cache: Path) -> None:
    (table,) = tables(search(cache, evaluations=STEPS)).values()
    assert quality(table, cache).min() > 80


# -- what is compared


def test_a_fit_beats_fewer_steps_and_a_forecast(cache: Path) -> None:
    result = search(cache, evaluations=5)
    rows: dict[str, float] = {}
    for row in result.details["2.0"]["tried"]:
        rows[row["origin"]] = max(rows.get(row["origin"], 0.0), row["validation_psnr_db"])
    assert set(rows) == {"polished", "fitted", "fewer steps", "forecast"}
    assert result.details["2.0"]["chosen"]["origin"] == "polished"
    assert rows["polished"] > rows["fitted"] + 1 > max(rows["fewer steps"], rows["forecast"]) + 2


def test_the_unfitted_table_is_returned_when_it_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that learned from something else: every weight of the latent is a tenth short."""
    fit = Fitter.fit

    def spoiled(self: Fitter, plan: Any, terms: Any) -> Any:
        good = fit(self, plan, terms)
        return replace(good, table=replace(good.table, state=good.table.state * 0.9))

    monkeypatch.setattr(Fitter, "fit", spoiled)
    result = search(cache, evaluations=6)
    (table,) = tables(result).values()
    chosen = result.details["2.0"]["chosen"]
    assert chosen["origin"] in ("fewer steps", "forecast")
    order = 0 if chosen["origin"] == "fewer steps" else 1
    wanted = fold(euler(STEPS), 2.0, [int(p) for p in table.positions], order)
    np.testing.assert_array_equal(table.conditional, wanted.conditional)
    assert chosen["calibration_psnr_db"] != chosen["calibration_psnr_db"]  # it was not fitted on any: NaN


def test_the_engine_is_what_is_fitted(cache: Path) -> None:
    """An engine with a gain of 0.9: the fit makes it up, and the exact field would not have needed to."""
    engine = Counter(gain=0.9)
    result = search(cache, engine=engine, evaluations=STEPS)
    (table,) = tables(result).values()
    assert engine.calls > 0
    assert quality(table, cache, engine=engine).mean() > 60 > quality(table, cache).mean()
    assert result.program.schedule is not None and result.program.schedule.fitted_on == "engine"


def test_moves_improve_the_calibration_samples(cache: Path) -> None:
    """Scored on all of them here, so a move that is accepted is an improvement of the figure."""

    def fitted(evaluations: int, moves: int) -> float:
        result = search(cache, evaluations=evaluations, search_samples=12, moves=moves)
        rows = [row for row in result.details["2.0"]["tried"] if row["origin"] == "fitted"]
        return max(row["calibration_psnr_db"] for row in rows)

    still, moved = ([fitted(evaluations, moves) for evaluations in (3, 4, 6, 7)] for moves in (0, 40))
    assert all(b >= a for a, b in zip(still, moved, strict=True))
    assert sum(moved) > sum(still) + 1


# -- guidance


def test_one_table_for_every_declared_scale(cache: Path) -> None:
    result = search(cache, scale={"values": [2.0, 4.0, 1.0]}, evaluations=4)
    fitted = tables(result)
    assert list(fitted) == [2.0, 4.0, 1.0] and set(result.details) == {"2.0", "4.0", "1.0"}
    assert [table.guided.all() for table in fitted.values()] == [True, True, False]
    assert result.changed == 3


def test_a_loop_without_guidance(cache: Path) -> None:
    fitted = tables(search(cache, scale=None, evaluations=4))
    assert list(fitted) == [1.0]
    assert not fitted[1.0].guided.any() and not fitted[1.0].unconditional.any()


@pytest.mark.parametrize("budget", [26.0, 32.0, 38.0, 44.0])
def test_the_unconditional_branch_is_left_out_where_the_budget_allows(cache: Path, budget: float) -> None:
    """One more evaluation without it would miss the budget on the samples that order them, or on validation."""
    result = search(cache, min_psnr=budget)
    (table,) = tables(result).values()
    assert lower_bound(quality(table, cache)) >= budget
    chosen = result.details["2.0"]["chosen"]
    assert chosen["unguided"] == [int(p) for p in table.positions[~table.guided]]
    assert len(chosen["unguided"]) == table.evaluations - table.guided_evaluations < table.evaluations


def test_some_budget_needs_fewer_branches_than_evaluations(cache: Path) -> None:
    found = [next(iter(tables(search(cache, min_psnr=float(budget))).values())) for budget in range(24, 48, 2)]
    assert any(table.guided_evaluations < table.evaluations for table in found)


@pytest.mark.parametrize("options", [{"evaluations": 6}, {"evaluations": 6, "min_psnr": 10.0}])
def test_a_number_of_evaluations_keeps_both_branches(cache: Path, options: dict[str, Any]) -> None:
    (table,) = tables(search(cache, **options)).values()
    assert table.guided.all()


def test_a_refit_keeps_the_branches(cache: Path) -> None:
    (table,) = tables(search(cache, evaluations=6)).values()
    guided = table.guided & ~np.isin(np.arange(6), [0, 5])
    unconditional = np.where(guided[None], table.unconditional, 0.0)
    candidate, searched = refit(
        cache, replace(table, guided=guided, unconditional=unconditional), Counter(), min_psnr=15.0
    )
    assert not searched and (candidate.table.guided == guided).all()


# -- the same again


def test_deterministic_for_a_seed(cache: Path, tmp_path: Path) -> None:
    """With trajectories read from the cache or made anew."""
    results = [search(folder, min_psnr=35.0) for folder in (cache, tmp_path)]
    first, second = (tables(result)[2.0] for result in results)
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
        return [plan.positions for plan in one.trials.scores]

    assert scored(0) == scored(0) != scored(1)


def test_another_seed_has_other_samples(cache: Path) -> None:
    first, second = (tables(search(cache, evaluations=4, seed=seed))[2.0] for seed in (0, 1))
    assert (first.conditional != second.conditional).any()


def test_progress_is_told(cache: Path) -> None:
    told: list[tuple[str, int, int]] = []
    program = program_of()
    context = analytic_context(program, cache, progress=lambda *report: told.append(report))
    SearchSchedule(ScheduleOptions.model_validate(QUICK | {"evaluations": 4})).run(program, context)
    assert any("searching" in task for task, _, _ in told)
    assert all(0 <= done <= total for _, done, total in told)


# -- fitting again


def refit(cache: Path, table: FoldedTable, engine: Counter, **options: Any) -> tuple[Candidate, bool]:
    program = program_of()
    context: Context = analytic_context(program, cache, engine)
    chosen = ScheduleOptions.model_validate(QUICK | options)
    return ScheduleSearch(chosen, program, engine.bound(), context, 2.0).refit(table)


def test_refit_keeps_the_positions_while_the_budget_is_met(cache: Path) -> None:
    (table,) = tables(search(cache, min_psnr=35.0)).values()
    candidate, searched = refit(cache, table, Counter(gain=0.95), min_psnr=35.0)
    assert not searched and candidate.low >= 35.0
    np.testing.assert_array_equal(candidate.table.positions, table.positions)
    assert (candidate.table.conditional != table.conditional).any()
    before = quality(table, cache, engine=Counter(gain=0.95))
    assert candidate.mean > before.mean()


def test_refit_searches_when_the_budget_is_missed(cache: Path) -> None:
    (table,) = tables(search(cache, evaluations=2)).values()
    candidate, searched = refit(cache, table, Counter(), min_psnr=60.0)
    assert searched and candidate.low >= 60.0 and candidate.table.evaluations > 2


def test_refit_of_a_number_of_evaluations_has_no_budget(cache: Path) -> None:
    (table,) = tables(search(cache, evaluations=2)).values()
    candidate, searched = refit(cache, table, Counter(), evaluations=2, min_psnr=90.0)
    assert not searched and candidate.table.evaluations == 2


def test_refit_keeps_a_table_that_is_better(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (table,) = tables(search(cache, evaluations=6)).values()
    fit = Fitter.fit
    monkeypatch.setattr(
        Fitter,
        "fit",
        lambda self, plan, terms: replace(fit(self, plan, terms), table=fold(euler(STEPS), 2.0, plan.positions)),
    )
    candidate, _ = refit(cache, table, Counter(), evaluations=6)
    assert candidate.origin == "as it was" and candidate.table is table


# -- what it does not apply to


def test_a_component_has_no_schedule() -> None:
    program = component(torch.nn.Linear(3, 3), torch.randn(2, 3))
    operation = SearchSchedule(ScheduleOptions())
    assert operation.not_applicable(program) == "the program has no loop"
    assert operation.not_applicable(program_of()) is None
