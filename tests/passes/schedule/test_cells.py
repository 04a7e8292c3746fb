"""Slots that a schedule fills from their own earlier outputs: outlines, weights, costs and the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analytic import CENTERS, Counter, analytic_context, analytic_program, euler, loop
from bodied import BODY, Bodied
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stepfold.calibration.trajectories import Trajectories, first, trajectories
from stepfold.loop.driver import LoopRun
from stepfold.loop.noise import SampleSet
from stepfold.loop.plan import REUSED, Plan, fold
from stepfold.passes.schedule.costs import Costs
from stepfold.passes.schedule.fit import Fitter
from stepfold.passes.schedule.methods import METHODS
from stepfold.passes.schedule.methods.polynomial import lagrange
from stepfold.passes.schedule.options import ScheduleOptions
from stepfold.passes.schedule.outline import Fill, Outline
from stepfold.passes.schedule.savings import Menu, Savings
from stepfold.passes.schedule.search import ScheduleSearch
from stepfold.passes.schedule.terms import Terms
from stepfold.passes.schedule.trials import Trials

STEPS, COUNT, SCALE = 12, 20, 2.0
TERMS = Terms(outputs=2, directions=1)
POSITIONS = (0, 2, 4, 6, 8, 10)
ALL = np.ones(len(POSITIONS), bool)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    program = analytic_program(euler(STEPS), loop(SCALE))
    samples = SampleSet("calibration", 0, COUNT)
    folder = tmp_path_factory.mktemp("cache")
    return trajectories(program, Counter().bound(), samples, SCALE, folder, lambda done, total: None)


def fitter(data: Trajectories, engine: Bodied | None = None) -> Fitter:
    return Fitter((engine or Bodied()).bound(), loop(SCALE), euler(STEPS), SCALE, data)


def reusing(*calls: int, by: int | str = "fitted", unguided: frozenset[int] = frozenset()) -> Outline:
    return Outline(POSITIONS, unguided, frozenset(Fill(BODY, call, by) for call in calls))


# -- outlines


def test_an_outline_is_that_of_its_plan(data: Trajectories) -> None:
    outline = reusing(2, 6, unguided=frozenset({6, 8}))
    plan = fitter(data).fit(outline, TERMS).plan
    assert Outline.of(plan, guided=True) == outline
    assert list(plan.cells[BODY].variant) == [0, REUSED, 0, REUSED, 0, 0]


def test_a_guided_evaluation_weighs_guided_ones_only() -> None:
    guided = np.array([True, False, True, True, False, True])
    outline = reusing(6)
    assert outline.anchors(BODY, guided, 3, 3) == [0, 2]
    assert outline.anchors(BODY, guided, 4, 3) == [0, 1, 2], "evaluation 3 is reused itself"
    assert outline.anchors(BODY, guided, 5, 1) == [2]


def test_an_outline_needs_something_to_reuse() -> None:
    assert reusing(2).possible(ALL) and not reusing(0).possible(ALL)
    assert not reusing(2).possible(np.array([False, True, True, True, True, True]))
    assert reusing(2, unguided=frozenset({0, 2})).possible(np.array([False, False, True, True, True, True]))


# -- weights


def test_without_fills_the_table_is_that_of_the_whole(data: Trajectories) -> None:
    whole = Fitter(Counter().bound(), loop(SCALE), euler(STEPS), SCALE, data).fit(Outline(POSITIONS), TERMS).plan
    plan = fitter(data).fit(Outline(POSITIONS), TERMS).plan
    assert not plan.cells
    for name in ("state", "conditional", "unconditional"):
        np.testing.assert_allclose(getattr(plan, name), getattr(whole, name), atol=1e-3)


@pytest.mark.parametrize("by", list(METHODS))
def test_the_samples_of_a_fit_are_those_of_its_plan(data: Trajectories, by: str) -> None:
    one = fitter(data)
    fit = one.fit(reusing(2, 6, 8, by=by, unguided=frozenset({4, 8})), TERMS)
    np.testing.assert_allclose(one.samples(fit.plan), fit.samples, atol=1e-6)
    assert np.abs(fit.plan.cells[BODY].weights).sum() > 0


def test_what_is_reused_is_not_computed(data: Trajectories) -> None:
    engine = Bodied()
    one = fitter(data, engine)
    plan = one.fit(reusing(2, 6, unguided=frozenset({6, 8})), TERMS).plan
    engine.forget()
    one.samples(plan)
    assert engine.rows == {"step.head": 10 * COUNT, BODY: 7 * COUNT, "step.tail": 10 * COUNT}


def test_the_weights_are_the_least_squares_answer(data: Trajectories) -> None:
    """Of the first evaluation that is reused, against NumPy's own solver, in the state that the loop is in."""
    one = fitter(data)
    plan = one.fit(reusing(4), TERMS).plan
    everything = replace(
        plan, cells={BODY: replace(plan.cells[BODY], variant=np.zeros(6, int), weights=np.zeros((6, 6)))}
    )
    columns, target = [], []
    for run in (LoopRun(one.bound, one.loop, piece, everything, keep=3) for piece in data.pieces):
        for k in range(2):
            run.evaluate(k)
            run.advance(k, everything)
        target.append(run.computed(BODY, 2)[0].ravel())
        columns.append(np.stack([run.outputs(BODY)[j][0].ravel() for j in (0, 1)]))
    wanted = np.linalg.lstsq(np.concatenate(columns, axis=1).T, np.concatenate(target), rcond=None)[0]
    np.testing.assert_allclose(plan.cells[BODY].weights[2, :2], wanted, rtol=1e-2)


@pytest.mark.parametrize(("by", "order"), [("repeat", 0), ("fitted", 0), ("forecast", 1), ("fitted", 1)])
def test_a_body_that_the_method_can_say_is_replaced_exactly(data: Trajectories, by: str, order: int) -> None:
    """A constant is repeated, a straight line in the call is carried on: no samples change."""
    one = fitter(data, Bodied(added=lambda x, s, c: np.ones_like(x) + order * s))
    plan = one.fit(reusing(4, 6, by=by), TERMS).plan
    np.testing.assert_allclose(one.samples(plan), one.samples(replace(plan, cells={})), atol=2e-4)


def test_the_polynomial_goes_through_its_anchors() -> None:
    np.testing.assert_allclose(lagrange(7, np.array([3])), [1])
    np.testing.assert_allclose(lagrange(7, np.array([3, 5])), [-1, 2])
    np.testing.assert_allclose(lagrange(5, np.array([3, 5])), [0, 1])


def test_fitted_weights_are_the_closest(data: Trajectories) -> None:
    """On the samples that they are fitted on, no other method of as many anchors comes nearer to the body."""
    one = fitter(data)

    def error(by: str) -> float:
        plan = one.fit(reusing(4, by=by), TERMS).plan
        runs = one.runs(plan, keep=3)
        squares = []
        for run in runs:
            for k in range(2):
                run.evaluate(k)
                run.advance(k, plan)
            weights = plan.cells[BODY].weights[2]
            guess = sum(weights[j] * run.outputs(BODY)[j][0] for j in (0, 1))
            squares.append(np.square(guess - run.computed(BODY, 2)[0]).sum())
        return float(np.sum(squares))

    assert error("fitted") < min(error("repeat"), error("forecast"))


@st.composite
def outlines(draw: st.DrawFn) -> Outline:
    positions = (0, *sorted(draw(st.sets(st.integers(1, STEPS - 1), min_size=2, max_size=5))))
    unguided = frozenset(draw(st.sets(st.sampled_from(positions[1:]), max_size=2)))
    reused = draw(st.sets(st.sampled_from(positions[1:]), max_size=3))
    return Outline(positions, unguided, frozenset(Fill(BODY, one, "fitted") for one in reused))


@settings(max_examples=25, deadline=None)
@given(outlines(), outlines())
def test_a_fit_that_goes_on_from_another_is_the_same_fit(data: Trajectories, model: Outline, outline: Outline) -> None:
    one = fitter(data)
    wanted = one.fit(outline, TERMS)
    found = one.traced(outline, TERMS, one.traced(model, TERMS))
    assert wanted.plan.arrays().keys() == found.fit.plan.arrays().keys()
    for name, value in wanted.plan.arrays().items():
        np.testing.assert_array_equal(found.fit.plan.arrays()[name], value, err_msg=name)
    np.testing.assert_array_equal(found.fit.samples, wanted.samples)


def test_values_that_are_no_numbers_repeat_the_newest_output(data: Trajectories) -> None:
    one = fitter(data, Bodied(added=lambda x, s, c: np.full_like(x, np.nan)))
    assert list(one.fit(reusing(4), TERMS).plan.cells[BODY].weights[2]) == [0, 1, 0, 0, 0, 0]


def test_two_methods_at_the_same_places_are_two_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Search(tmp_path, monkeypatch).search.trials
    plans = [trials.fitted(reusing(4, 8, by=by)).plan for by in METHODS]
    assert len({plan.cells[BODY].weights.tobytes() for plan in plans}) == len(METHODS)


# -- costs


def test_costs_are_measured_for_each_slot_and_both_numbers_of_branches(data: Trajectories) -> None:
    bound = Bodied().bound()
    costs = Costs.measured(bound, loop(SCALE), first(data, 2).pieces[0], fold(euler(STEPS), SCALE))
    assert costs.unit == "s" and all(value > 0 for value in costs.of_slots.values())
    assert {key[0] for key in costs.of_slots} == {"step.head", BODY, "step.tail"}
    assert {key[2] for key in costs.of_slots} == {False, True}


def test_what_a_method_fills_costs_nothing() -> None:
    costs = fixed_costs()
    assert costs.of(Outline(POSITIONS), ALL) == 6 * 2 * 10
    assert costs.of(reusing(2, 4), ALL) == 6 * 2 * 10 - 2 * 2 * 8
    guided = np.array([True, True, False, True, True, True])
    assert costs.of(reusing(2, unguided=frozenset({4})), guided) == 5 * 2 * 10 + 10 - 2 * 8


def fixed_costs() -> Costs:
    each = {"step.head": 1.0, BODY: 8.0, "step.tail": 1.0}
    return Costs({(name, 0, both): (1 + both) * cost for name, cost in each.items() for both in (False, True)}, "s")


# -- savings


def savings(losses: Mapping[int, float], branch: float = 1.0) -> Savings:
    """Each reused body loses what is given for its position, each branch the same; losses add up."""

    def score(outline: Outline) -> float:
        return 50.0 - sum(losses[one.position] for one in outline.fills) - branch * len(outline.unguided)

    def guided(outline: Outline) -> np.ndarray:
        return np.array([one not in outline.unguided for one in outline.positions])

    return Savings(score, guided, fixed_costs(), [Menu(BODY, ("fitted",))])


def test_the_saving_that_loses_least_for_what_it_saves_comes_first() -> None:
    """A body of both branches saves 16, a branch 10."""
    found = savings({0: 0, 2: 1.0, 4: 0.1, 6: 9, 8: 9, 10: 9}, branch=1.0).outlines(Outline(POSITIONS), 47.0)
    assert [sorted(one.position for one in outline.fills) for outline in found[:2]] == [[4], [2, 4]]
    assert [len(outline.unguided) for outline in found] == [0, 0, 1]
    assert all(not any(one.position == 0 for one in outline.fills) for outline in found)


def test_a_saving_that_costs_too_much_is_passed_over() -> None:
    found = savings({0: 9, 2: 9, 4: 0.1, 6: 2.5, 8: 0.2, 10: 0.3}, branch=9).outlines(Outline(POSITIONS), 49.6)
    assert [len(outline.fills) for outline in found] == [1, 2]


# -- the search


class Search:
    """A search on a program whose body is most of the cost and changes slowly, and whose tail is stiff."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch, **options: Any):
        monkeypatch.setattr(Trials, "costs", lambda _: fixed_costs())
        program = analytic_program(euler(STEPS), loop(SCALE))
        engine = Bodied(lambda x, s, c: (1 + s) * CENTERS[c], lambda h, s: 0.6 * np.sin(5 * h) + s * h)
        context = replace(analytic_context(program, cache), engine=lambda _: engine.bound(), reference=engine.bound)
        chosen = ScheduleOptions.model_validate({"samples": 12, "search_samples": 8, "moves": 6, **options})
        self.search = ScheduleSearch(chosen, program, engine.bound(), context, SCALE)

    def cost(self, plan: Plan) -> float:
        return fixed_costs().of(Outline.of(plan, guided=True), plan.guided)


def test_the_cheapest_plan_within_the_budget_leaves_out_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found with cells, it costs less than the one that is found without them, and meets the same budget."""
    cells, plain = (Search(tmp_path, monkeypatch, min_psnr=45.0, fill=fill) for fill in (("fitted",), ()))
    with_cells, without = cells.search.run(), plain.search.run()
    assert min(with_cells.psnr.low, without.psnr.low) >= 45.0
    assert with_cells.plan.cells and not without.plan.cells
    assert cells.cost(with_cells.plan) < plain.cost(without.plan)
    row = with_cells.row()
    assert row["reused"][BODY] == [int(p) for p in with_cells.plan.positions[with_cells.plan.cells[BODY].variant != 0]]


def test_a_plan_with_cells_is_fitted_again_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Search(tmp_path, monkeypatch, min_psnr=45.0)
    plan = one.search.run().plan
    again, searched = Search(tmp_path, monkeypatch, min_psnr=45.0).search.refit(plan)
    assert not searched
    assert Outline.of(again.plan, guided=True) == Outline.of(plan, guided=True)


def test_a_method_that_there_is_not() -> None:
    with pytest.raises(ValidationError, match="expected methods: fitted, repeat, forecast"):
        ScheduleOptions.model_validate({"fill": ["fited"]})
