"""The driver against loops written by hand, with stages that count how often and on how many rows they run."""

from __future__ import annotations

from collections.abc import Mapping
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
    denoiser,
    hoisted,
    plain,
    port,
    recurrence,
    request,
)

from stepfold.loop import driver
from stepfold.loop.driver import LoopRun, Request, run_loop
from stepfold.loop.plan import Plan, Update, fold
from stepfold.loop.ports import BoundProgram, BoundStage, InputPort, Rate, bound_slots
from stepfold.loop.recurrence import Recurrence


def by_hand(r: Recurrence, req: Request, scale: float | None) -> Array:
    """Every call in float64, both branches, the recurrence by its definition."""
    x, outputs = r.initial_scale * req.noise.astype(np.float64), []
    for i in range(r.calls):
        t = np.full(len(x), r.timesteps[i])
        v = denoiser(r.input_scale[i] * x, t, req.conditions["c"])
        if scale is not None:
            assert req.unconditional is not None
            u = denoiser(r.input_scale[i] * x, t, req.unconditional["c"])
            v = u + scale * (v - u)
        outputs.append(v)
        x = r.state[i] * x + sum(r.outputs[i, j] * outputs[j] for j in range(i + 1))
    return x


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("depth", [1, 3])
def test_loop_without_guidance(batch: int, depth: int) -> None:
    r, counter = recurrence(depth), Counter()
    req = request(batch, guided=False)
    assert_close(run_loop(plain(counter), LOOP, req, fold(r)), by_hand(r, req, None))
    assert counter.rows == {"step": [batch] * S}


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("depth", [1, 3])
def test_loop_with_guidance(batch: int, depth: int) -> None:
    r, counter = recurrence(depth), Counter()
    req = request(batch)
    assert_close(run_loop(plain(counter), LOOP, req, fold(r, SCALE)), by_hand(r, req, SCALE))
    assert counter.rows == {"step": [2 * batch] * S}


def test_guidance_of_one_runs_one_branch() -> None:
    r, counter = recurrence(), Counter()
    req = request(4)
    assert_close(run_loop(plain(counter), LOOP, req, fold(r, 1.0)), by_hand(r, req, None))
    assert counter.rows == {"step": [4] * S}


def test_mixed_guided_and_unguided_evaluations() -> None:
    """Evaluations 1 and 3 skip the unconditional branch; their guidance direction is that of the evaluation before."""
    r, counter = recurrence(), Counter()
    full = fold(r, SCALE)
    guided = np.array([True, False, True, False, True, True])
    conditional, unconditional = full.conditional.copy(), full.unconditional.copy()
    for j in (1, 3):  # v_j = c_j + (scale - 1) (c_{j-1} - u_{j-1})
        b = r.outputs[j, j]
        unconditional[:, j] = 0.0
        conditional[j, j] = b
        conditional[j, j - 1] += b * (SCALE - 1)
        unconditional[j, j - 1] -= b * (SCALE - 1)
    table = replace(full, guided=guided, conditional=conditional, unconditional=unconditional)
    req = request(3)
    assert req.unconditional is not None
    x, before = r.initial_scale * req.noise.astype(np.float64), 0.0
    for i in range(S):
        t, scaled = np.full(3, r.timesteps[i]), r.input_scale[i] * x
        c = denoiser(scaled, t, req.conditions["c"])
        if guided[i]:
            before = c - denoiser(scaled, t, req.unconditional["c"])
        x = r.state[i] * x + r.outputs[i, i] * (c + (SCALE - 1) * before)
    assert_close(run_loop(plain(counter), LOOP, req, table), x)
    assert counter.rows == {"step": [6, 3, 6, 3, 6, 6]}
    assert_close(run_loop(hoisted(Counter()), LOOP, req, table), x)


def test_a_guided_plan_needs_the_unconditional_conditions() -> None:
    with pytest.raises(ValueError, match="the plan has guided evaluations, so the request needs unconditional"):
        run_loop(plain(), LOOP, request(2, guided=False), fold(recurrence(), SCALE))


def test_requests_leave_no_state() -> None:
    """A second request, of another size in between, gives the bits of the first; the caller's arrays stay as given."""
    program, table = hoisted(Counter()), fold(recurrence(depth=3), SCALE, [0, 1, 4], order=1)
    req = request(5)
    given = req.noise.copy()
    first = run_loop(program, LOOP, req, table)
    run_loop(program, LOOP, request(1, seed=9), table)
    np.testing.assert_array_equal(run_loop(program, LOOP, req, table), first)
    np.testing.assert_array_equal(req.noise, given)
    assert not np.shares_memory(first, req.noise)


def test_samples_of_a_batch_are_those_of_each_alone() -> None:
    program, table = hoisted(Counter()), fold(recurrence(depth=2), SCALE)
    req = request(5)
    together = run_loop(program, LOOP, req, table)
    assert req.unconditional is not None
    for i in range(5):
        rows = slice(i, i + 1)
        alone = Request(req.noise[rows], {"c": req.conditions["c"][rows]}, {"c": req.unconditional["c"][rows]})
        np.testing.assert_array_equal(run_loop(program, LOOP, alone, table), together[rows])


def test_latent_stays_float32() -> None:
    """Also where an engine answers in another precision; weights of a table are float64."""
    seen = []

    def call(values: Mapping[str, Array]) -> list[Array]:
        seen.append(values["x"].dtype)
        return [denoiser(values["x"], values["t"], values["c"]).astype(np.float64)]

    stage = BoundStage("step", Rate.STEP, (X, T, C), (V,), call)
    req = request(2)
    received = run_loop(BoundProgram(INPUTS, ("v",), bound_slots(stage), {}), LOOP, req, fold(recurrence(2), SCALE))
    assert set(seen) == {np.dtype("float32")}
    assert_close(received, by_hand(recurrence(2), req, SCALE))


def test_integer_timesteps_are_rounded_not_cut() -> None:
    """A grid computed in float32 holds 979.99994 where it means 980."""
    seen: list[Array] = []

    def remember(x: Array, t: Array, c: Array) -> Array:
        seen.append(t)
        return x

    whole = port("t", dtype="int64")
    stage = Counter().stage("step", Rate.STEP, (X, whole, C), (V,), remember)
    program = BoundProgram((INPUTS[0], InputPort(whole, "timestep"), INPUTS[2]), ("v",), bound_slots(stage), {})
    r = replace(recurrence(), timesteps=np.array([1000.0, 979.99994, 960.00006, 3.0, 2.0, 1.0]))
    run_loop(program, LOOP, request(2, guided=False), fold(r))
    np.testing.assert_array_equal([t[0] for t in seen], [1000, 980, 960, 3, 2, 1])


@pytest.mark.parametrize(
    ("table", "held"),
    [
        (fold(recurrence(depth=1), SCALE), [{k} for k in range(S)]),
        (fold(recurrence(depth=3), SCALE), [set(range(max(0, k - 2), k + 1)) for k in range(S)]),
        (fold(recurrence(depth=1), SCALE, [0, 2, 4], order=1), [{0}, {0, 1}, {1, 2}]),
    ],
    ids=["euler", "three-outputs", "forecast"],
)
def test_ring_holds_what_updates_read_and_no_more(
    table: Plan, held: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ring: list[set[int]] = []

    class Watched(LoopRun):
        def update(self, k: int, weights: Update) -> None:
            super().update(k, weights)
            ring.append(set(self.history))

    monkeypatch.setattr(driver, "LoopRun", Watched)
    run_loop(plain(), LOOP, request(2), table)
    assert ring == held


def test_forgotten_outputs_are_not_read_again() -> None:
    run = LoopRun(plain(), LOOP, request(2), fold(recurrence(depth=2), SCALE))
    run.evaluate(0)
    run.forget(0)
    run.forget(0)  # forgetting twice is no error
    assert run.history == {}
    before = run.latent.copy()
    run.update(0, Update(0.5, np.ones(S), np.ones(S)))
    np.testing.assert_array_equal(run.latent, np.float32(0.5) * before)


def test_stepping_by_hand_is_run_loop() -> None:
    """The search evaluates, chooses an update, applies it, goes on; with the table's own updates that is the loop."""
    table, req = fold(recurrence(depth=2), SCALE, [0, 1, 3], order=1), request(5)
    run = LoopRun(hoisted(Counter()), LOOP, req, table)
    for k in range(table.evaluations):
        c, u = run.evaluate(k)
        assert u is not None and c.shape == u.shape == (5, *LATENT)
        run.update(k, table.update(k))
    np.testing.assert_array_equal(run.latent, run_loop(hoisted(Counter()), LOOP, req, table))


def test_progress_is_told_after_each_evaluation() -> None:
    told: list[tuple[int, int]] = []
    run_loop(plain(), LOOP, request(1), fold(recurrence(), SCALE, [0, 3]), on_step=lambda k, n: told.append((k, n)))
    assert told == [(1, 2), (2, 2)]
