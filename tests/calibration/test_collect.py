"""Statistics of a real loop, compared with the loop run by hand."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import CALLS, INNER, TOKENS, Network, network_program, standard
from programs import component, context_of

from stepfold.calibration import sampling
from stepfold.calibration.collect import collect_shard, one_thread, tensor_name
from stepfold.calibration.conditions import sample_request
from stepfold.calibration.observe import SiteObserver
from stepfold.calibration.plan import CalibrationPlan, Settings, make_plan
from stepfold.ir.program import Program
from stepfold.loop.errors import StepfoldError
from stepfold.loop.noise import SampleSet
from stepfold.passes.hoist.hoist import Hoist, HoistOptions
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize

Array = np.ndarray
SAMPLES = 6
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
"""Of float32 values behind four steps of another summation order."""


def collect(
    program: Program, samples: int = SAMPLES, shard: int = 0, **settings: Any
) -> tuple[CalibrationPlan, dict[str, Array]]:
    plan = make_plan(program, Settings(samples=samples, **settings))
    return plan, collect_shard(plan, shard, lambda done, total: None)


def site(plan: CalibrationPlan, arrays: dict[str, Array], name: str) -> dict[str, Array]:
    (index,) = [i for i, item in enumerate(plan.watched) if item.entry.name == name]
    prefix = tensor_name(index, "")
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def by_hand() -> dict[tuple[str, int, int], torch.Tensor]:
    """(site, call, branch) -> rows [B T, M] of an eager loop of four Euler steps at scale 2."""
    program, model = standard(), Network()
    request = sample_request(program, SampleSet("calibration", 0, SAMPLES))
    assert program.recurrence is not None and request.unconditional is not None
    seen: dict[tuple[str, int, int], torch.Tensor] = {}
    x = torch.from_numpy(request.noise)
    with torch.no_grad():
        for call, timestep in enumerate(program.recurrence.timesteps):
            outputs = []
            for branch, rows in enumerate((request.conditions, request.unconditional)):
                c, t = torch.from_numpy(rows["c"]), torch.full((SAMPLES,), float(timestep))
                shifted = x + 0.1 * c[:, None, None]
                values = {
                    "first": shifted,
                    "third": x,
                    "second": torch.tanh(model.first(shifted)),
                    "time": t[:, None] / 1000,
                }
                for name, value in values.items():
                    seen[name, call, branch] = value.reshape(-1, value.shape[-1])
                outputs.append(model(x, t, c))
            conditional, unconditional = outputs
            x = x - (unconditional + 2.0 * (conditional - unconditional)) / CALLS
    return seen


@pytest.mark.parametrize("name", ["first", "second", "third", "time"])
def test_statistics_are_those_of_the_loop_run_by_hand(by_hand, name: str) -> None:
    plan, arrays = collect(standard())
    found = site(plan, arrays, name)
    for call in range(CALLS):
        for branch in range(2):
            rows, at = by_hand[name, call, branch].double(), (call, branch)
            assert found["count"][at] == len(rows)
            for part, value in {
                "low": rows.amin(0),
                "high": rows.amax(0),
                "total": rows.sum(0),
                "magnitude": rows.abs().sum(0),
                "square": rows.square().sum(0),
            }.items():
                np.testing.assert_allclose(found[part][at], value.numpy(), **TOLERANCE)
    every = torch.cat([rows.double() for (which, *_), rows in by_hand.items() if which == name])
    np.testing.assert_allclose(found["gram"], (every.T @ every).numpy(), **TOLERANCE)
    assert found["gram_count"].item() == len(every)


def test_raw_rows_are_rows_of_their_bucket_and_branch(by_hand) -> None:
    plan, arrays = collect(standard())
    found = site(plan, arrays, "second")
    assert len(found["rows"]) == len(found["rows_at"]) > 0
    for row, (bucket, branch) in zip(found["rows"], found["rows_at"], strict=True):
        distance = (by_hand["second", bucket, branch] - torch.from_numpy(row)).abs().amax(1).min()
        assert distance < 1e-5
    cells = {tuple(at) for at in found["rows_at"].tolist()}
    assert cells == {(bucket, branch) for bucket in range(CALLS) for branch in range(2)}


def test_buckets_join_calls(by_hand) -> None:
    plan, arrays = collect(standard(), buckets=2)
    found = site(plan, arrays, "second")
    assert found["low"].shape == (2, 2, INNER)
    rows = torch.cat([by_hand["second", call, 1] for call in (2, 3)])
    np.testing.assert_allclose(found["high"][1, 1], rows.amax(0), **TOLERANCE)
    assert arrays["seen"].tolist() == [[2 * SAMPLES, 2 * SAMPLES]] * 2


def test_shards_are_parts_of_the_samples() -> None:
    plan, whole = collect(standard(), samples=20)
    parts = [collect_shard(plan, i, lambda *_: None) for i in range(3)]
    assert [int(part["seen"][0, 0]) for part in parts] == [8, 8, 4]
    assert all(whole[name].tobytes() == parts[0][name].tobytes() for name in whole)
    _, alone = collect(standard(), samples=8)
    np.testing.assert_array_equal(parts[0]["0000.low"], alone["0000.low"])  # the same first samples


def test_of_a_seed() -> None:
    results = [collect(standard(), seed=seed)[1] for seed in (0, 0, 1)]
    assert all(results[0][name].tobytes() == results[1][name].tobytes() for name in results[0])
    assert not np.array_equal(results[0]["0000.low"], results[2]["0000.low"])


def test_many_tokens_are_subsampled_for_the_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TOKENS", 2)
    plan, arrays = collect(standard())
    found = site(plan, arrays, "second")
    assert found["gram_count"].item() == SAMPLES * CALLS * 2 * 2 < found["count"].sum() == SAMPLES * CALLS * 2 * TOKENS
    assert site(plan, arrays, "time")["gram_count"].item() == SAMPLES * CALLS * 2


def test_progress_counts_evaluations() -> None:
    told: list[tuple[int, int]] = []
    collect_shard(make_plan(standard(), Settings(samples=2)), 0, lambda *report: told.append(report))
    assert told == [(i + 1, CALLS) for i in range(CALLS)]


# -- other programs


def test_a_hoisted_program_has_the_same_statistics(tmp_path: Path) -> None:
    hoisted = Hoist(HoistOptions()).run(standard(), context_of(standard(), tmp_path)).program
    (before, first), (after, second) = collect(standard()), collect(hoisted)
    for name in ("first", "second", "third"):
        expected, received = site(before, first, name), site(after, second, name)
        for part in ("count", "low", "high", "total", "gram", "rows"):
            np.testing.assert_allclose(received[part], expected[part], **TOLERANCE)


def test_a_quantized_program_is_observed_in_floats(tmp_path: Path) -> None:
    options = QuantizeOptions(activations="static", min_tokens=1)
    quantized = Quantize(options).run(standard(), context_of(standard(), tmp_path)).program
    (before, first), (after, second) = collect(standard()), collect(quantized)
    expected, received = site(before, first, "second"), site(after, second, "second")
    np.testing.assert_allclose(received["low"], expected["low"], atol=0.2)
    assert not np.array_equal(received["low"], expected["low"])  # the values of the quantized loop


def test_without_guidance_there_is_one_branch() -> None:
    plan, arrays = collect(network_program(guided=False))
    assert arrays["seen"].tolist() == [[SAMPLES]] * CALLS
    assert site(plan, arrays, "second")["low"].shape == (CALLS, 1, INNER)


def test_a_component_runs_on_its_example() -> None:
    x = torch.tensor([[[1.0, -2.0]], [[3.0, 0.5]]])
    plan = make_plan(component(torch.nn.Linear(2, 2), x), Settings())
    arrays = collect_shard(plan, 0, lambda *_: None)
    assert (arrays["0000.low"].tolist(), arrays["0000.high"].tolist()) == ([[[1.0, -2.0]]], [[[3.0, 0.5]]])
    assert arrays["seen"].tolist() == [[2]] and arrays["0000.gram_count"].tolist() == [2]
    np.testing.assert_array_equal(np.sort(arrays["0000.rows"], axis=0), np.sort(x.reshape(2, 2).numpy(), axis=0))


def test_a_value_without_a_batch_is_seen_once() -> None:
    layer = torch.nn.Linear(4, 4)
    program = component(lambda x, table: x + layer(table), torch.randn(2, 6, 4), torch.randn(6, 4))
    arrays = collect_shard(make_plan(program, Settings()), 0, lambda *_: None)
    assert arrays["0000.count"].tolist() == [[6]]


# -- values that are no numbers


class Broken(Network):
    """Becomes infinite, or NaN, in one branch at one call."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        bad = (t <= 500) & (c == 3)
        inner = torch.tanh(self.first(x))
        inner = torch.where(bad[:, None, None], torch.full_like(inner, self.value), inner)
        return self.second(inner) + self.time(t[:, None] / 1000)[:, None]


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_value_that_is_not_finite_is_named(value: float, what: str) -> None:
    """The third of four calls has timestep 500; row 3 is the unconditional one."""
    program = network_program(Broken(value))
    message = (
        rf"^site second: expected finite activations; received {what} at call 2 \(timestep 500\), unconditional branch, "
        r"samples 8 to 9\. Check"
    )
    with pytest.raises(StepfoldError, match=message):
        collect(program, samples=10, shard=1)


def test_a_component_has_no_call_to_name() -> None:
    layer = torch.nn.Linear(2, 2)
    program = component(lambda x: layer(torch.log(x)), torch.full((2, 2), -1.0))
    with pytest.raises(StepfoldError, match=r"^site .*: expected finite activations; received NaN, conditional branch"):
        collect_shard(make_plan(program, Settings()), 0, lambda *_: None)


# -- how it runs


def test_one_thread_and_then_as_many_as_before() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_an_observer_computes_what_the_graph_does() -> None:
    program, seen = standard(), defaultdict(list)
    nodes = [node for node in program.step.graph.graph.nodes if node.op == "call_function"]
    observer = SiteObserver(program.step.graph, {node: seen[node].append for node in nodes})
    example = tuple(program.example.values())
    with torch.no_grad():
        torch.testing.assert_close(observer.run(*example)[0], program.step.graph(*example)[0], rtol=0, atol=0)
    assert all(len(seen[node]) == 1 for node in nodes)
