"""What fills the slots at each evaluation: variants and sums of earlier outputs, against loops written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from loops import INPUTS, LOOP, SCALE, Array, C, Counter, T, V, X, assert_close, column, port, recurrence, request

from stepfold.loop.driver import LoopRun, Request, run_loop
from stepfold.loop.plan import REUSED, Cell, Plan, fold
from stepfold.loop.ports import BoundProgram, BoundSlot, Rate, bound_slots
from stepfold.loop.recurrence import Recurrence

HEAD, ADDED = port("head", 2, 3), port("added", 2, 3)
POSITIONS = [0, 1, 2, 4]
BODY = "step.body"


def head(x: Array, t: Array, c: Array) -> Array:
    return column(np.cos(t / 400)) * x + column(c / 10)


def body(h: Array, t: Array) -> Array:
    return column(np.sin(t / 300)) * h


def tail(h: Array, a: Array) -> Array:
    return h + 0.5 * a


def three(counter: Counter | None = None) -> BoundProgram:
    """A denoiser cut in three; the body has a second variant that computes twice as much."""
    made = counter or Counter()
    first = made.stage("step.head", Rate.STEP, (X, T, C), (HEAD,), head)
    bodies = (
        made.stage(BODY, Rate.STEP, (HEAD, T), (ADDED,), body),
        made.stage("step.body_1", Rate.STEP, (HEAD, T), (ADDED,), lambda h, t: 2 * body(h, t)),
    )
    last = made.stage("step.tail", Rate.STEP, (HEAD, ADDED), (V,), tail)
    (before,), (after,) = bound_slots(first), bound_slots(last)
    return BoundProgram(INPUTS, ("v",), (before, BoundSlot(BODY, bodies), after), {})


def cell(variant: list[int], **weights: dict[int, float]) -> Cell:
    """A cell whose evaluation `at<k>` weighs earlier ones."""
    N = len(variant)
    table = np.zeros((N, N))
    for name, row in weights.items():
        for j, weight in row.items():
            table[int(name.removeprefix("at")), j] = weight
    return Cell(np.array(variant), table)


CACHED = cell([0, REUSED, 1, REUSED], at1={0: 1.0}, at3={0: -0.5, 2: 1.25})


def planned(r: Recurrence, scale: float | None = SCALE, cells: Cell = CACHED) -> Plan:
    return replace(fold(r, scale, POSITIONS), cells={BODY: cells})


def by_hand(r: Recurrence, plan: Plan, req: Request, cells: Cell) -> Array:
    """The loop in float64, each branch on its own."""
    x, outputs = plan.initial_scale * req.noise.astype(np.float64), []
    added: dict[str, list[Array]] = {"conditional": [], "unconditional": []}
    for k, position in enumerate(POSITIONS):
        t = np.full(len(x), r.timesteps[position])
        found: dict[str, Array] = {}
        for branch, conditions in (("conditional", req.conditions), ("unconditional", req.unconditional)):
            if conditions is None or (branch == "unconditional" and not plan.guided[k]):
                added[branch].append(np.full_like(x, np.nan))
                continue
            h = head(plan.input_scale[k] * x, t, conditions["c"]).astype(np.float64)
            if cells.variant[k] == REUSED:
                a = sum(cells.weights[k, j] * added[branch][j] for j in range(k) if cells.weights[k, j])
            else:
                a = (1 + cells.variant[k]) * body(h, t)
            added[branch].append(np.asarray(a))
            found[branch] = tail(h, a)
        outputs.append(found)
        x = plan.state[k] * x + sum(
            plan.conditional[k, j] * outputs[j]["conditional"]
            + (plan.unconditional[k, j] * outputs[j]["unconditional"] if plan.guided[j] else 0.0)
            for j in range(k + 1)
        )
    return x


@pytest.mark.parametrize("scale", [SCALE, None])
def test_a_reused_slot_is_a_sum_of_its_earlier_outputs(scale: float | None) -> None:
    r, counter = recurrence(), Counter()
    plan, req = planned(r, scale), request(3, guided=scale is not None)
    assert_close(run_loop(three(counter), LOOP, req, plan), by_hand(r, plan, req, CACHED))
    rows = 3 if scale is None else 6
    assert counter.rows == {"step.head": [rows] * 4, BODY: [rows], "step.body_1": [rows], "step.tail": [rows] * 4}


def test_an_unguided_evaluation_reuses_the_conditional_rows() -> None:
    r, counter = recurrence(), Counter()
    plan, guided = planned(r), np.array([True, False, True, True])
    unconditional = plan.unconditional * guided
    plan = replace(plan, guided=guided, unconditional=unconditional)
    req = request(2)
    assert_close(run_loop(three(counter), LOOP, req, plan), by_hand(r, plan, req, CACHED))
    assert counter.rows["step.tail"] == [4, 2, 4, 4]


def test_a_cell_that_computes_everything_changes_no_bit() -> None:
    r, req = recurrence(), request(3)
    plain = run_loop(three(), LOOP, req, fold(r, SCALE, POSITIONS))
    np.testing.assert_array_equal(run_loop(three(), LOOP, req, planned(r, cells=cell([0, 0, 0, 0]))), plain)


def test_outputs_are_dropped_after_their_last_reader() -> None:
    r = recurrence()
    plan, req = planned(r), request(2)
    run, held = LoopRun(three(), LOOP, req, plan), []
    for k in range(plan.evaluations):
        run.evaluate(k)
        held.append(sorted(run._slots[BODY].kept))
        run.advance(k, plan)
    assert held == [[0], [0], [0, 2], []]


def test_forks_do_not_share_what_they_keep() -> None:
    r = recurrence()
    plan, req = planned(r), request(2)
    run = LoopRun(three(), LOOP, req, plan)
    run.evaluate(0)
    run.advance(0, plan)
    twin = run.fork()
    for k in range(1, 4):
        run.evaluate(k)
        run.advance(k, plan)
    follower = LoopRun(three(), LOOP, req, plan)
    follower.stand_where(twin)
    for k in range(1, 4):
        follower.evaluate(k)
        follower.advance(k, plan)
    np.testing.assert_array_equal(follower.latent, run.latent)


def test_a_plan_with_cells_is_the_same_after_it_was_written() -> None:
    plan = planned(recurrence())
    again = Plan.from_arrays(plan.arrays())
    assert set(again.cells) == {BODY}
    for name, value in plan.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], value, err_msg=name)


WRONG: dict[str, dict[str, Any]] = {
    r"needs \[2\] numbers of variants": {"variant": np.array([0, -2]), "weights": np.zeros((2, 2))},
    "numbers of variants, -1 where it is reused": {"variant": np.array([0.0, 0.0]), "weights": np.zeros((2, 2))},
    "weighs earlier outputs only": {"variant": np.array([0, REUSED]), "weights": np.eye(2)},
    r"by \[2, 2\] below the diagonal": {"variant": np.array([0, REUSED]), "weights": np.zeros((3, 3))},
    "must be finite": {"variant": np.array([0, REUSED]), "weights": np.array([[0, 0], [np.nan, 0]])},
    "where it is reused, and nothing elsewhere": {"variant": np.array([0, 0]), "weights": np.array([[0, 0], [1.0, 0]])},
    "needs an earlier output": {"variant": np.array([0, REUSED]), "weights": np.zeros((2, 2))},
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_no_cell_is_refused(reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Cell(**WRONG[reason])


def test_a_reused_output_is_no_source() -> None:
    with pytest.raises(ValueError, match="where it is reused, and nothing elsewhere"):
        cell([0, REUSED, REUSED], at1={0: 1.0}, at2={1: 1.0})


def test_a_guided_evaluation_reuses_guided_ones() -> None:
    plan = planned(recurrence())
    guided = np.array([False, True, True, True])
    with pytest.raises(ValueError, match=r"slot 'step\.body': a guided evaluation reuses outputs of both branches"):
        replace(plan, guided=guided, unconditional=plan.unconditional * guided)


def test_a_cell_has_as_many_evaluations_as_its_plan() -> None:
    with pytest.raises(ValueError, match=r"the cell of slot 'step\.body' must be of 4 evaluations; it is of 2"):
        planned(recurrence(), cells=cell([0, 0]))
