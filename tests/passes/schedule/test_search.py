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
from searching import QUICK, STEPS, plans, program_of, quality, refit, search

from stepfold.loop.budget import PsnrFigures, QualityBudget
from stepfold.loop.errors import GateError, UsageError
from stepfold.loop.metrics import lower_bound
from stepfold.loop.plan import Plan, fold
from stepfold.passes.base import PassResult
from stepfold.passes.schedule.fit import Fitter
from stepfold.passes.schedule.options import ScheduleOptions
from stepfold.passes.schedule.outline import Outline
from stepfold.passes.schedule.positions import WARPS, warped
from stepfold.passes.schedule.schedule import SearchSchedule
from stepfold.passes.schedule.search import KEPT_WARPS, ScheduleSearch
from stepfold.passes.schedule.trials import Candidate, Trials

# -- a budget


@pytest.mark.parametrize("budget", [float(budget) for budget in range(22, 54, 2)])
def test_the_budget_is_met_by_the_lower_bound(cache: Path, budget: float) -> None:
    """Some of these lie between the bound and the mean of a candidate."""
    result = search(cache, min_psnr=budget)
    (plan,) = plans(result).values()
    values = quality(plan, cache)
    assert lower_bound(values) >= budget
    assert quality(plan, cache, "held-out").mean() > budget - 3
    chosen = result.details["2.0"]["chosen"]
    assert chosen["validation_low_db"] == pytest.approx(lower_bound(values), abs=1e-3)
    assert chosen["validation_psnr_db"] == pytest.approx(values.mean(), abs=1e-3)


def test_a_harder_budget_costs_more_evaluations(cache: Path) -> None:
    easy, hard = (search(cache, min_psnr=budget) for budget in (25.0, 45.0))
    evaluations = [next(iter(plans(result).values())).evaluations for result in (easy, hard)]
    assert evaluations[0] < evaluations[1] < STEPS


def test_one_evaluation_fewer_misses_the_budget(cache: Path) -> None:
    """The plan that is shipped is the last that was good enough."""
    result = search(cache, min_psnr=40.0)
    (plan,) = plans(result).values()
    fewer = [row for row in result.details["2.0"]["tried"] if row["evaluations"] == plan.evaluations - 1]
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


def test_a_tail_that_is_missed_while_the_mean_is_met_costs_evaluations(cache: Path) -> None:
    (easy,) = plans(search(cache, min_psnr=30.0)).values()
    figures = PsnrFigures.of(quality(easy, cache))
    assert figures.low >= 30.0 and figures.p05 == np.percentile(quality(easy, cache), 5)
    result = search(cache, min_psnr={"mean": 30.0, "p05": figures.p05 + 1})
    (hard,) = plans(result).values()
    assert hard.evaluations > easy.evaluations
    reached = PsnrFigures.of(quality(hard, cache))
    assert reached.low >= 30.0 and reached.p05 >= figures.p05 + 1
    assert result.details["2.0"]["chosen"]["validation_p05_db"] == pytest.approx(reached.p05, abs=1e-3)
    again, searched = refit(cache, easy, Counter(), min_psnr={"mean": 30.0, "p05": figures.p05 + 1})
    assert searched and again.psnr.p05 >= figures.p05 + 1


def test_a_tail_that_cannot_be_met(cache: Path) -> None:
    with pytest.raises(GateError) as caught:
        search(cache, engine=Crooked(), min_psnr={"mean": 20.0, "p05": 120.0})
    found = re.fullmatch(
        r"schedule: no schedule reaches 20 dB and 120 dB at the 5th percentile; the best was ([\d.]+) dB \(lower 95 % "
        r"bound of the mean over 64 validation samples; met\) and ([\d.]+) dB at the 5th percentile \(missed\) with "
        r"(\d+) of 12 evaluations\. Lower min_psnr, or use a recipe of higher precision\.",
        str(caught.value),
    )
    assert found and 20 < float(found[2]) < float(found[1]) < 120


class Crooked(Counter):
    """An engine whose error no linear update can take back."""

    def __call__(self, inputs: Any) -> list[np.ndarray]:
        (value,) = super().__call__(inputs)
        return [value + np.float32(0.02) * np.sign(value)]


def test_a_budget_of_the_user_wins_over_the_recipes(cache: Path) -> None:
    program = program_of()
    context = analytic_context(program, cache, min_psnr=QualityBudget(mean=25))
    strict = SearchSchedule(ScheduleOptions.model_validate({**QUICK, "min_psnr": 60.0})).run(program, context)
    (plan,) = plans(strict).values()
    assert plan.evaluations == next(iter(plans(search(cache, min_psnr=25.0)).values())).evaluations


def spread_polish(monkeypatch: pytest.MonkeyPatch, budget: float) -> None:
    """Polished plans have the better mean, and a lower bound that misses the budget."""
    measure = Trials.measure

    def spread(self: Trials, plan: Plan, origin: str, calibration: float = float("nan")) -> Candidate:
        found = measure(self, plan, origin, calibration)
        return found if origin != "polished" else widened(self, found)

    def widened(trials: Trials, found: Candidate) -> Candidate:
        wide = replace(found, psnr=replace(found.psnr, mean=found.psnr.mean + 5, low=budget - 0.1))
        trials.tried[trials.tried.index(found)] = wide
        return wide

    monkeypatch.setattr(Trials, "measure", spread)


def test_a_better_mean_that_misses_the_budget_is_not_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = plans(search(cache, min_psnr=46.0)).values()
    spread_polish(monkeypatch, 46.0)
    chosen = search(cache, scale=None, min_psnr=46.0).details["None"]["chosen"]
    assert chosen["validation_low_db"] >= 46.0 and chosen["origin"] != "polished"
    again, searched = refit(cache, before, Counter(), min_psnr=46.0)
    assert again.psnr.low >= 46.0 and again.origin != "polished" and not searched


def test_a_budget_of_zero_is_a_budget(cache: Path) -> None:
    program = program_of()
    context = analytic_context(program, cache, min_psnr=QualityBudget(mean=0))
    result = SearchSchedule(ScheduleOptions.model_validate({**QUICK, "min_psnr": 60.0})).run(program, context)
    assert next(iter(plans(result).values())).evaluations == 1


def test_auto_needs_a_budget(cache: Path) -> None:
    with pytest.raises(UsageError, match="evaluations `auto` needs a budget: set min_psnr or a number of evaluations"):
        search(cache, min_psnr=None)


# -- a number of evaluations


@pytest.mark.parametrize("evaluations", [1, 2, 5, STEPS])
def test_a_fixed_number_of_evaluations(cache: Path, evaluations: int) -> None:
    """The budget is a reported figure then: 90 dB is not met, and no error."""
    result = search(cache, evaluations=evaluations, min_psnr=90.0)
    (plan,) = plans(result).values()
    assert plan.evaluations == evaluations
    assert result.details["2.0"]["chosen"]["evaluations"] == evaluations
    assert result.changed == 1


def test_a_budget_of_the_user_holds_for_a_number_too(cache: Path) -> None:
    """The recipe's budget is reported then; the user's is met, or the command fails."""
    program = program_of()

    def of(budget: float) -> PassResult:
        options = ScheduleOptions.model_validate({**QUICK, "evaluations": 5})
        return SearchSchedule(options).run(
            program, analytic_context(program, cache, min_psnr=QualityBudget(mean=budget))
        )

    assert of(25.0).details["2.0"]["chosen"]["validation_low_db"] >= 25.0
    with pytest.raises(GateError, match=r"no schedule of 5 evaluations reaches 90 dB; .* allow more evaluations"):
        of(90.0)


def test_more_evaluations_than_the_grid_has(cache: Path) -> None:
    with pytest.raises(UsageError, match="evaluations must be 1 to 12, the calls of the sampler; received 13"):
        search(cache, evaluations=13)


def test_every_call_is_the_full_loop(cache: Path) -> None:
    (plan,) = plans(search(cache, evaluations=STEPS)).values()
    assert quality(plan, cache).min() > 80


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

    def spoiled(self: Fitter, outline: Any, terms: Any) -> Any:
        good = fit(self, outline, terms)
        return replace(good, plan=replace(good.plan, state=good.plan.state * 0.9))

    monkeypatch.setattr(Fitter, "fit", spoiled)
    result = search(cache, evaluations=6)
    (plan,) = plans(result).values()
    chosen = result.details["2.0"]["chosen"]
    assert chosen["origin"] in ("fewer steps", "forecast")
    order = 0 if chosen["origin"] == "fewer steps" else 1
    wanted = fold(euler(STEPS), 2.0, [int(p) for p in plan.positions], order)
    np.testing.assert_array_equal(plan.conditional, wanted.conditional)
    assert chosen["calibration_psnr_db"] != chosen["calibration_psnr_db"]  # it was not fitted on any: NaN


def test_the_engine_is_what_is_fitted(cache: Path) -> None:
    """An engine with a gain of 0.9: the fit makes it up, and the exact field would not have needed to."""
    engine = Counter(gain=0.9)
    result = search(cache, engine=engine, evaluations=STEPS)
    (plan,) = plans(result).values()
    assert engine.calls > 0
    assert quality(plan, cache, engine=engine).mean() > 60 > quality(plan, cache).mean()
    assert result.program.schedule is not None and result.program.schedule.fitted_on == "engine"


@pytest.mark.parametrize("calls", [4, 8, 9])
def test_warps_are_compared_where_calls_are_few(cache: Path, calls: int) -> None:
    """The first comparison is of one evaluation then, whose grid is (0,) for every warp, and says nothing of them."""
    program = analytic_program(euler(calls), loop(2.0, calls))
    options = ScheduleOptions.model_validate({**QUICK, "moves": 0, "min_psnr": 90.0})
    one = ScheduleSearch(options, program, Counter().bound(), analytic_context(program, cache), 2.0)
    one.run()
    scored = {outline.positions for outline in one.trials.scores}
    assert (0,) in scored
    for evaluations in {len(positions) for positions in scored}:
        grids = {warped(calls, evaluations, a, b) for a, b in WARPS}
        assert len(grids & scored) >= min(len(grids), KEPT_WARPS)


@pytest.mark.parametrize(
    ("low", "polished", "sparing", "expected"),
    [
        (40.5, 41.0, True, []),  # the budget is met without
        (35.0, 36.5, True, []),  # it is too far away
        (39.0, 40.2, True, ["first"]),  # met by the better one
        (39.0, 39.3, True, ["first"]),  # missed by more than a rival gains
        (39.0, 39.8, True, ["first", "rival"]),
        (40.5, 41.0, False, ["first", "rival"]),  # what is shipped
    ],
)
def test_a_rival_is_polished_only_where_it_may_decide(
    cache: Path, monkeypatch: pytest.MonkeyPatch, low: float, polished: float, sparing: bool, expected: list[str]
) -> None:
    program, done = program_of(), list[str]()
    options = ScheduleOptions.model_validate({**QUICK, "min_psnr": 40.0})
    one = ScheduleSearch(options, program, Counter().bound(), analytic_context(program, cache), 2.0)
    plan = fold(euler(STEPS), 2.0, (0, 4, 8))
    outlines = {"rival": Outline((0, 4, 8)), "first": Outline((0, 3, 8)), "far": Outline((0, 2, 8))}
    below = {"first": 0.0, "rival": 0.1, "far": 0.6}
    fits = {
        outline: Candidate(plan, name, PsnrFigures(low + 1 - below[name], low - below[name], 0, 0), 0)
        for name, outline in outlines.items()
    }

    def polish(outline: Outline) -> Candidate:
        done.append(fits[outline].origin)
        return replace(fits[outline], psnr=replace(fits[outline].psnr, low=polished))

    monkeypatch.setattr(one.trials, "polished", polish)
    one._polish(fits, sparing)
    assert done == expected


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
    fitted = plans(result)
    assert list(fitted) == [2.0, 4.0, 1.0] and set(result.details) == {"2.0", "4.0", "1.0"}
    assert [plan.guided.all() for plan in fitted.values()] == [True, True, False]
    assert result.changed == 3


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_of_at_most_one_is_fitted_on_one_branch(cache: Path, scale: float) -> None:
    result = search(cache, scale=scale, evaluations=4)
    rows = {row["origin"]: row["validation_psnr_db"] for row in result.details[str(scale)]["tried"]}
    assert rows["fitted"] > rows["fewer steps"] + 1
    (plan,) = plans(result).values()
    assert not plan.guided.any() and not plan.unconditional.any()


def test_a_loop_without_guidance(cache: Path) -> None:
    fitted = plans(search(cache, scale=None, evaluations=4))
    assert list(fitted) == [1.0]
    assert not fitted[1.0].guided.any() and not fitted[1.0].unconditional.any()


@pytest.mark.parametrize("budget", [26.0, 32.0, 38.0, 44.0])
def test_the_unconditional_branch_is_left_out_where_the_budget_allows(cache: Path, budget: float) -> None:
    """One more evaluation without it would miss the budget on the samples that order them, or on validation."""
    result = search(cache, min_psnr=budget)
    (plan,) = plans(result).values()
    assert lower_bound(quality(plan, cache)) >= budget
    chosen = result.details["2.0"]["chosen"]
    assert chosen["unguided"] == [int(p) for p in plan.positions[~plan.guided]]
    assert len(chosen["unguided"]) == plan.evaluations - plan.guided_evaluations < plan.evaluations


def test_some_budget_needs_fewer_branches_than_evaluations(cache: Path) -> None:
    found = [next(iter(plans(search(cache, min_psnr=float(budget))).values())) for budget in range(24, 48, 2)]
    assert any(plan.guided_evaluations < plan.evaluations for plan in found)


@pytest.mark.parametrize("options", [{"evaluations": 6}, {"evaluations": 6, "min_psnr": 10.0}])
def test_a_number_of_evaluations_keeps_both_branches(cache: Path, options: dict[str, Any]) -> None:
    (plan,) = plans(search(cache, **options)).values()
    assert plan.guided.all()


def test_a_refit_keeps_the_branches(cache: Path) -> None:
    (plan,) = plans(search(cache, evaluations=6)).values()
    guided = plan.guided & ~np.isin(np.arange(6), [0, 5])
    unconditional = np.where(guided[None], plan.unconditional, 0.0)
    candidate, searched = refit(
        cache, replace(plan, guided=guided, unconditional=unconditional), Counter(), min_psnr=15.0
    )
    assert not searched and (candidate.plan.guided == guided).all()


# -- what it does not apply to


def test_a_component_has_no_schedule() -> None:
    program = component(torch.nn.Linear(3, 3), torch.randn(2, 3))
    operation = SearchSchedule(ScheduleOptions())
    assert operation.not_applicable(program) == "the program has no loop"
    assert operation.not_applicable(program_of()) is None
