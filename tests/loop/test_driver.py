"""The driver against loops written by hand, with stages that count how often and on how many rows they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from stepfold.loop import driver
from stepfold.loop.driver import LoopRun, Request, run_loop
from stepfold.loop.noise import noise
from stepfold.loop.ports import BoundProgram, BoundStage, InputPort, Port, Rate
from stepfold.loop.recurrence import Recurrence
from stepfold.loop.spec import LoopSpec
from stepfold.loop.table import FoldedTable, fold

Array = np.ndarray
S, SCALE, LATENT = 6, 2.5, (2, 3)
LOOP = LoopSpec.model_validate(
    {
        "inputs": {"x": "state", "t": "timestep", "c": "condition"},
        "sampler": {"scheduler": "FlowMatchEulerDiscreteScheduler", "steps": S},
        "guidance": {"scale": SCALE, "unconditional": {"c": 10}},
        "latent": {"shape": list(LATENT)},
    }
)
TOLERANCE = 1e-5  # float32 over S updates


@dataclass
class Counter:
    """Wraps the functions of stages; `rows[name]` lists the number of rows of each call."""

    rows: dict[str, list[int]] = field(default_factory=dict)

    def stage(
        self, name: str, rate: Rate, inputs: Sequence[Port], outputs: Sequence[Port], f: Callable[..., Array]
    ) -> BoundStage:
        def call(values: Mapping[str, Array]) -> list[Array]:
            assert set(values) == {port.name for port in inputs}
            assert {port.name: values[port.name].dtype.name for port in inputs} == {p.name: p.dtype for p in inputs}
            sizes = {len(value) for value in values.values()}
            assert len(sizes) == 1, f"{name} got mixed batches"
            self.rows.setdefault(name, []).append(sizes.pop())
            return [f(*(values[port.name] for port in inputs))]

        return BoundStage(name, rate, tuple(inputs), tuple(outputs), call)


def port(name: str, *shape: int, dtype: str = "float32") -> Port:
    return Port(name, (None, *shape), dtype)


X, V = port("x", *LATENT), port("v", *LATENT)
T, C = port("t"), port("c", dtype="int64")
INPUTS = (InputPort(X, "state"), InputPort(T, "timestep"), InputPort(C, "condition"))


def column(values: Array) -> Array:
    """[B] -> [B, 1, 1] float32, to stand beside a latent."""
    return values.astype("float32")[:, None, None]


def denoiser(x: Array, t: Array, c: Array) -> Array:
    """Linear in x, with its own slope and offset for each timestep and condition."""
    return column(np.cos(t / 400)) * x * (1 + column(c) / 20) + column(np.sin(t / 300) + c / 10)


def plain(counter: Counter | None = None, timestep: Port = T) -> BoundProgram:
    """Everything in the step stage."""
    stage = (counter or Counter()).stage("step", Rate.STEP, (X, timestep, C), (V,), denoiser)
    inputs = (INPUTS[0], InputPort(timestep, "timestep"), INPUTS[2])
    return BoundProgram(inputs, ("v",), (stage,), {})


def hoisted(counter: Counter) -> BoundProgram:
    """The same denoiser cut by rate: once, timestep, once×timestep and step."""
    once, slope, both = port("once"), port("slope"), port("both")
    stages = (
        counter.stage("once", Rate.ONCE, (C,), (once,), lambda c: (c / 20).astype("float32")),
        counter.stage("timestep", Rate.TIMESTEP, (T,), (slope,), lambda t: np.cos(t / 400).astype("float32")),
        counter.stage(
            "both",
            Rate.ONCE_TIMESTEP,
            (T, C, once),
            (both,),
            lambda t, c, once: (np.sin(t / 300) + 2 * once).astype("float32"),
        ),
        counter.stage(
            "step",
            Rate.STEP,
            (X, slope, once, both),
            (V,),
            lambda x, slope, once, both: column(slope) * x * (1 + column(once)) + column(both),
        ),
    )
    return BoundProgram(INPUTS, ("v",), stages, {})


def recurrence(depth: int = 1) -> Recurrence:
    generator = np.random.default_rng(0)
    outputs = np.diag(np.full(S, -1 / S))
    for offset in range(1, depth):
        outputs += np.diag(generator.uniform(0.05, 0.1, S - offset), -offset)
    return Recurrence(
        np.linspace(1000.0, 100.0, S), np.linspace(0.5, 1.0, S), np.linspace(0.8, 1.0, S), outputs, initial_scale=3.0
    )


def request(batch: int, guided: bool = True, seed: int = 1) -> Request:
    conditions = {"c": np.arange(batch) % 3}
    return Request(noise(seed, (batch, *LATENT)), conditions, {"c": np.full(batch, 10)} if guided else None)


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


def assert_close(received: Array, expected: Array) -> None:
    assert received.dtype == np.float32 and received.shape == expected.shape
    np.testing.assert_allclose(received, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


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
    program = replace(program, stages=(program.stages[0], spy, *program.stages[2:]))
    run_loop(program, LOOP, request(2), fold(recurrence(), SCALE, [0, 2, 5]))
    np.testing.assert_array_equal(seen, [recurrence().timesteps[[0, 2, 5]].astype("float32")])


def test_tables_are_read_at_the_evaluated_calls() -> None:
    """`slope` was computed at compile time for every call of the grid."""
    r, counter = recurrence(), Counter()
    whole = hoisted(counter)
    table = np.cos(r.timesteps / 400).astype("float32")
    stages = tuple(stage for stage in whole.stages if stage.name != "timestep")
    program = replace(whole, stages=stages, tables={"slope": table})
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
    program = BoundProgram(INPUTS[:2], ("v",), stages, {"half": (r.timesteps / 2).astype("float32")})
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
    cut = BoundProgram(INPUTS, ("v",), stages, {"slope": np.cos(r.timesteps / 400).astype("float32")})

    def whole(x: Array, t: Array, c: Array) -> Array:
        return x + column(np.cos(t / 400) * (1 + c) + t / 1000)

    stage = Counter().stage("step", Rate.STEP, (X, T, C), (V,), whole)
    req, table = request(5), fold(r, SCALE, [0, 2, 3, 5])
    assert_close(
        run_loop(cut, LOOP, req, table), run_loop(BoundProgram(INPUTS, ("v",), (stage,), {}), LOOP, req, table)
    )
    assert counter.rows == {"both": [16], "sum": [16], "step": [10] * 4}


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


def test_guided_table_needs_the_unconditional_conditions() -> None:
    with pytest.raises(ValueError, match="the table has guided evaluations, so the request needs unconditional"):
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
    received = run_loop(BoundProgram(INPUTS, ("v",), (stage,), {}), LOOP, req, fold(recurrence(2), SCALE))
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
    program = BoundProgram((INPUTS[0], InputPort(whole, "timestep"), INPUTS[2]), ("v",), (stage,), {})
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
    table: FoldedTable, held: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ring: list[set[int]] = []

    class Watched(LoopRun):
        def update(self, state: float, conditional: Array, unconditional: Array) -> None:
            super().update(state, conditional, unconditional)
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
    run.update(0.5, np.ones(S), np.ones(S))
    np.testing.assert_array_equal(run.latent, np.float32(0.5) * before)


def test_stepping_by_hand_is_run_loop() -> None:
    """The search evaluates, chooses an update, applies it, goes on; with the table's own updates that is the loop."""
    table, req = fold(recurrence(depth=2), SCALE, [0, 1, 3], order=1), request(5)
    run = LoopRun(hoisted(Counter()), LOOP, req, table)
    for k in range(table.evaluations):
        c, u = run.evaluate(k)
        assert u is not None and c.shape == u.shape == (5, *LATENT)
        run.update(float(table.state[k]), table.conditional[k], table.unconditional[k])
    np.testing.assert_array_equal(run.latent, run_loop(hoisted(Counter()), LOOP, req, table))


def test_progress_is_told_after_each_evaluation() -> None:
    told: list[tuple[int, int]] = []
    run_loop(plain(), LOOP, request(1), fold(recurrence(), SCALE, [0, 3]), on_step=lambda k, n: told.append((k, n)))
    assert told == [(1, 2), (2, 2)]


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
    program = replace(whole, stages=stages, tables={"slope": np.cos(r.timesteps / 400).astype("float32")})
    inputs = {"x": noise(1, (2, *LATENT)), "t": np.full(2, r.timesteps[2], np.float32), "c": np.array([0, 1])}
    (received,) = program.evaluate(inputs, call=2)
    assert_close(received, denoiser(**inputs))
    with pytest.raises(ValueError, match="a program with timestep tables is evaluated at a grid call"):
        program.evaluate(inputs)
