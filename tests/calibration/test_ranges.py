"""Ranges and Gram matrices of activations over the real loop."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from programs import calls, component, denoiser
from torch import fx

from stepfold.calibration import ranges
from stepfold.calibration.conditions import sample_request
from stepfold.calibration.observe import SiteObserver
from stepfold.calibration.ranges import ROWS_PER_CHANNEL, SAMPLES, Range
from stepfold.ir.program import Program, Stage
from stepfold.loop.noise import SampleSet

aten = torch.ops.aten


def silent(task: str, done: int, total: int) -> None:
    """Report to nobody."""


def node_of(stage: Stage, target: object) -> fx.Node:
    (node,) = [node for node in calls(stage) if node.target is target]
    return node


class Denoiser(torch.nn.Module):
    """y = tanh(W x) + t / 1000 + c: the tanh is watched."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x)) + (t / 1000 + 0.01 * c)[:, None]


@pytest.fixture(scope="module")
def program() -> Program:
    return denoiser(Denoiser(), torch.randn(2, 3), torch.full((2,), 5.0), torch.arange(2))


def observe(program: Program, targets: tuple, seed: int = 0, progress=silent) -> Mapping[fx.Node, Range]:
    nodes = [node_of(program.step, target) for target in targets]
    return ranges.observe(program, nodes, seed, progress).ranges


def test_over_the_real_loop_of_all_branches(program: Program) -> None:
    """As an eager loop of four Euler steps sees them, guided, for ten samples."""
    model = Denoiser()
    request = sample_request(program, SampleSet("calibration", 0, SAMPLES))
    assert program.recurrence is not None and request.unconditional is not None
    x = torch.from_numpy(request.noise)
    c, u = (torch.from_numpy(rows["c"]) for rows in (request.conditions, request.unconditional))
    seen = []
    with torch.no_grad():
        for timestep in program.recurrence.timesteps:
            t = torch.full((SAMPLES,), float(timestep))
            seen.append(torch.tanh(model.layer(x)))
            conditional, unconditional = model(x, t, c), model(x, t, u)
            x = x - (unconditional + 2.0 * (conditional - unconditional)) / 4
    (received,) = observe(program, (aten.tanh.default,)).values()
    assert received.low.shape == (4, 3), "four calls, one bucket each"
    for bucket, values in enumerate(seen):
        torch.testing.assert_close(received.low[bucket], values.amin(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(received.high[bucket], values.amax(0), rtol=1e-4, atol=1e-5)


def test_only_what_is_watched(program: Program) -> None:
    found = observe(program, (aten.tanh.default, aten.linear.default))
    assert list(found) == [node_of(program.step, target) for target in (aten.linear.default, aten.tanh.default)]


def test_of_a_seed(program: Program) -> None:
    first, again, other = (next(iter(observe(program, (aten.tanh.default,), seed).values())) for seed in (0, 0, 1))
    assert torch.equal(first.low, again.low) and torch.equal(first.high, again.high)
    assert not torch.equal(first.low, other.low)


def test_progress_counts_evaluations(program: Program) -> None:
    told: list[tuple[str, int, int]] = []
    observe(program, (aten.tanh.default,), progress=lambda *report: told.append(report))
    assert told == [("calibrating", i, 4) for i in (1, 2, 3, 4)]


def test_a_component_is_observed_on_its_example() -> None:
    x = torch.tensor([[[1.0, -2.0]], [[3.0, 0.5]]])
    program = component(lambda x: torch.tanh(x * 2), x)
    (received,) = observe(program, (aten.mul.Tensor,)).values()
    assert (received.low.tolist(), received.high.tolist()) == ([[2.0, -4.0]], [[6.0, 1.0]])


def test_a_range_has_one_entry_a_channel_and_bucket() -> None:
    found = Range.of(torch.tensor([[[1.0, -2.0], [0.5, 7.0]]]), bucket=1, buckets=2)
    assert found.low.tolist() == [[torch.inf, torch.inf], [0.5, -2.0]]
    assert found.high.tolist() == [[-torch.inf, -torch.inf], [1.0, 7.0]]
    both = found.union(Range.of(torch.tensor([[-3.0, 0.0]]), bucket=1, buckets=2))
    assert (both.low[1].tolist(), both.high[1].tolist()) == ([-3.0, -2.0], [1.0, 7.0])


def gram(program: Program, seed: int = 0) -> torch.Tensor:
    node = node_of(program.step, aten.tanh.default)
    return ranges.observe(program, [node], seed, silent, {node}).grams[node]


def test_a_gram_matrix_is_of_all_branches_and_calls(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for more rows than there are, it is the mean over what an observer sees itself."""
    node, seen = node_of(program.step, aten.tanh.default), []
    of = Range.of
    monkeypatch.setattr(Range, "of", lambda value, *at: seen.append(value.double()) or of(value, *at))
    monkeypatch.setattr(ranges, "GRAM_ROWS_PER_CHANNEL", 1000)
    received = ranges.observe(program, [node], 0, silent, {node}).grams[node]
    rows = torch.cat(seen)
    assert len(rows) == 2 * 4 * SAMPLES
    torch.testing.assert_close(received, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_rows_of_a_gram_matrix_follow_the_seed(program: Program) -> None:
    assert torch.equal(gram(program), gram(program))
    assert not torch.equal(gram(program), gram(program, seed=1))


def test_too_few_rows_give_no_gram_matrix() -> None:
    rows = 3 * ROWS_PER_CHANNEL
    for count, found in ((rows - 1, False), (rows, True)):
        program = component(lambda x: torch.tanh(x * 2), torch.randn(2, count, 3)[:1])
        node = node_of(program.step, aten.tanh.default)
        assert (node in ranges.observe(program, [node], 0, silent, {node}).grams) is found


def test_nan_is_not_lost() -> None:
    found = Range.of(torch.tensor([[1.0, 2.0]]), 0, 1).union(Range.of(torch.tensor([[float("nan"), 1.0]]), 0, 1))
    assert found.low.isnan().tolist() == [[True, False]] and found.high.isnan().tolist() == [[True, False]]


def test_an_observer_computes_what_the_graph_does(program: Program) -> None:
    observer = SiteObserver(program.step.graph, {node_of(program.step, aten.tanh.default): [].append})
    example = tuple(program.example.values())
    with torch.no_grad():
        torch.testing.assert_close(observer.run(*example)[0], program.step.graph(*example)[0], rtol=0, atol=0)
