"""The driver with stages of several rates and with tables: what runs when, on how many rows."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from loops import (
    INPUTS,
    LATENT,
    LOOP,
    SCALE,
    Array,
    C,
    Counter,
    S,
    T,
    V,
    X,
    assert_close,
    column,
    denoiser,
    hoisted,
    plain,
    port,
    recurrence,
    request,
)

from stepfold.loop import driver
from stepfold.loop.driver import Request, run_loop
from stepfold.loop.noise import noise
from stepfold.loop.plan import fold
from stepfold.loop.ports import BoundProgram, BoundStage, InputPort, Rate, bound_slots
from stepfold.loop.spec import LoopSpec


@pytest.mark.parametrize("batch", [1, 5])
def test_hoisted_stages_run_once_for_the_distinct_rows(batch: int) -> None:
    """Classes 0, 1, 2 and the unconditional 10: five samples have R = 4 distinct rows, not 10."""
    r, counter = recurrence(depth=2), Counter()
    req = request(batch)
    positions = [0, 1, 3, 4]
    table = fold(r, SCALE, positions, order=1)
    received = run_loop(hoisted(counter), LOOP, req, table)
    R, N = {1: 2, 5: 4}[batch], len(positions)
    assert counter.rows == {"once": [R], "timestep": [N], "both": [N * R], "step": [2 * batch] * N}
    assert_close(received, run_loop(plain(), LOOP, req, table))


def test_hoisted_stages_see_the_evaluated_timesteps_only() -> None:
    seen: list[Array] = []
    program = hoisted(Counter())
    spy = replace(program.stages[1], call=lambda values: [(seen.append(values["t"]), np.cos(values["t"] / 400))[1]])
    program = replace(program, slots=bound_slots(program.stages[0], spy, *program.stages[2:]))
    run_loop(program, LOOP, request(2), fold(recurrence(), SCALE, [0, 2, 5]))
    np.testing.assert_array_equal(seen, [recurrence().timesteps[[0, 2, 5]].astype("float32")])


def test_tables_are_read_at_the_evaluated_calls() -> None:
    """`slope` was computed at compile time for every call of the grid."""
    r, counter = recurrence(), Counter()
    whole = hoisted(counter)
    table = np.cos(r.timesteps / 400).astype("float32")
    stages = tuple(stage for stage in whole.stages if stage.name != "timestep")
    program = replace(whole, slots=bound_slots(*stages), tables={"slope": table})
    req, folded = request(5), fold(r, SCALE, [0, 2, 3, 5])
    assert_close(run_loop(program, LOOP, req, folded), run_loop(plain(), LOOP, req, folded))
    assert "timestep" not in counter.rows


def test_timestep_stage_reads_a_table() -> None:
    """A stage of rate timestep gets one row for each evaluation of a table, beside the timesteps."""
    r = recurrence()
    half, slope = port("half"), port("slope")
    counter = Counter()
    stages = (
        counter.stage("timestep", Rate.TIMESTEP, (T, half), (slope,), lambda t, half: t + 0.0 * half + half),
        counter.stage("step", Rate.STEP, (X, slope), (V,), lambda x, slope: 0.001 * column(slope) * x),
    )
    program = BoundProgram(INPUTS[:2], ("v",), bound_slots(*stages), {"half": (r.timesteps / 2).astype("float32")})
    free = LOOP.model_copy(update={"inputs": {k: v for k, v in LOOP.inputs.items() if k != "c"}, "guidance": None})
    req = Request(noise(1, (2, *LATENT)), {}, None)
    x = r.initial_scale * req.noise.astype(np.float64)
    for k in (0, 1, 2, 3, 4, 5):
        x = r.state[k] * x + r.outputs[k, k] * 0.0015 * r.timesteps[k] * r.input_scale[k] * x
    assert_close(run_loop(program, free, req, fold(r)), x)
    assert counter.rows == {"timestep": [S], "step": [2] * S}


def test_stages_of_both_rates_read_tables_and_each_other() -> None:
    """once×timestep <- timestep table, and once×timestep <- once×timestep: rows of N evaluations times R conditions."""
    r, counter = recurrence(), Counter()
    slope, both, sum_ = port("slope"), port("both"), port("sum")
    stages = (
        counter.stage("both", Rate.ONCE_TIMESTEP, (slope, C), (both,), lambda slope, c: slope * (1 + c).astype("f4")),
        counter.stage("sum", Rate.ONCE_TIMESTEP, (both, T), (sum_,), lambda both, t: both + t / 1000),
        counter.stage("step", Rate.STEP, (X, sum_), (V,), lambda x, total: x + column(total)),
    )
    cut = BoundProgram(INPUTS, ("v",), bound_slots(*stages), {"slope": np.cos(r.timesteps / 400).astype("float32")})

    def whole(x: Array, t: Array, c: Array) -> Array:
        return x + column(np.cos(t / 400) * (1 + c) + t / 1000)

    stage = Counter().stage("step", Rate.STEP, (X, T, C), (V,), whole)
    req, table = request(5), fold(r, SCALE, [0, 2, 3, 5])
    assert_close(
        run_loop(cut, LOOP, req, table),
        run_loop(BoundProgram(INPUTS, ("v",), bound_slots(stage), {}), LOOP, req, table),
    )
    assert counter.rows == {"both": [16], "sum": [16], "step": [10] * 4}


def with_text() -> tuple[BoundProgram, LoopSpec]:
    """A class beside a text [B, 2^20], which only the stage of rate once reads."""
    text, shift, both = port("text", 1 << 20), port("shift"), port("both")
    inputs = (*INPUTS, InputPort(text, "condition"))
    spec = LOOP.model_dump() | {"inputs": {port.name: port.role for port in inputs}}
    spec["guidance"] = {"scale": SCALE, "unconditional": "input"}
    stages = (
        BoundStage("once", Rate.ONCE, (text,), (shift,), lambda values: [values["text"].mean(axis=1)]),
        BoundStage(
            "both",
            Rate.ONCE_TIMESTEP,
            (C, T, shift),
            (both,),
            lambda values: [(values["c"] + values["t"] / 1000 + values["shift"]).astype("f4")],
        ),
        BoundStage("step", Rate.STEP, (X, both), (V,), lambda values: [values["x"] + column(values["both"])]),
    )
    return BoundProgram(inputs, ("v",), bound_slots(*stages), {}), LoopSpec.model_validate(spec)


@pytest.fixture(scope="module")
def texts() -> Request:
    conditions = {"c": np.arange(2), "text": np.ones((2, 1 << 20), np.float32)}
    return Request(noise(1, (2, *LATENT)), conditions, {**conditions, "text": -conditions["text"]})


def test_a_condition_that_a_stage_does_not_read_is_not_repeated_for_every_call(texts: Request) -> None:
    """Its four rows of 4 MiB would be 96 MiB for six calls."""
    program, spec = with_text()
    tracemalloc.start()
    run_loop(program, spec, texts, fold(recurrence(), SCALE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20


def test_stages_of_both_rates_run_in_batches_of_a_bounded_size(texts: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is a class of 8 bytes and three numbers of 4; there are 6 calls and 4 distinct rows."""
    program, spec = with_text()
    table, sizes = fold(recurrence(), SCALE), list[int]()
    whole = run_loop(program, spec, texts, table)

    def spied(values: Mapping[str, Array]) -> Sequence[Array]:
        sizes.append(len(values["t"]))
        return program.stages[1].call(values)

    monkeypatch.setattr("stepfold.loop.driver.PREPARED_BYTES", 10 * 20)
    spy = replace(program.stages[1], call=spied)
    cut = replace(program, slots=bound_slots(program.stages[0], spy, program.stages[2]))
    np.testing.assert_array_equal(run_loop(cut, spec, texts, table), whole)
    assert sizes == [8, 8, 8]


def test_the_rows_of_a_request_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search runs one request for hundreds of schedules, and a text of 4 MiB takes a while to hash."""
    compared, real = list[int](), driver._distinct_rows
    monkeypatch.setattr(driver, "_distinct_rows", lambda rows: (compared.append(1), real(rows))[1])
    req = request(3)
    for positions in ([0, 2], [0, 3]):
        run_loop(plain(), LOOP, req, fold(recurrence(), SCALE, positions))
    assert compared == [1]


# --- ports: what the driver runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "rate"),
    [
        ([], Rate.CONST),
        (["constant"], Rate.CONST),
        (["condition", "constant"], Rate.ONCE),
        (["timestep"], Rate.TIMESTEP),
        (["timestep", "condition"], Rate.ONCE_TIMESTEP),
        (["state"], Rate.STEP),
        (["state", "timestep", "condition"], Rate.STEP),
    ],
)
def test_rate_of_roles(roles: list, rate: Rate) -> None:
    assert Rate.of(roles) is rate


def test_evaluate_runs_all_stages_on_the_same_rows() -> None:
    counter = Counter()
    inputs = {"x": noise(1, (3, *LATENT)), "t": np.full(3, 400, np.float32), "c": np.array([0, 1, 10])}
    (received,) = hoisted(counter).evaluate(inputs)
    assert_close(received, denoiser(**inputs))
    assert counter.rows == {"once": [3], "timestep": [3], "both": [3], "step": [3]}


def test_evaluate_with_tables_needs_the_call() -> None:
    r = recurrence()
    whole = hoisted(Counter())
    stages = tuple(stage for stage in whole.stages if stage.name != "timestep")
    program = replace(whole, slots=bound_slots(*stages), tables={"slope": np.cos(r.timesteps / 400).astype("float32")})
    inputs = {"x": noise(1, (2, *LATENT)), "t": np.full(2, r.timesteps[2], np.float32), "c": np.array([0, 1])}
    (received,) = program.evaluate(inputs, call=2)
    assert_close(received, denoiser(**inputs))
    with pytest.raises(ValueError, match="a program with timestep tables is evaluated at a grid call"):
        program.evaluate(inputs)
