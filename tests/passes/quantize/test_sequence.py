"""Layers realized in sequence: each under the moments of what it reads behind those before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import component, context_of, denoiser
from quantization_fixtures import mean_gram
from torch import nn

from stepfold.calibration.memory import peak_bytes
from stepfold.calibration.observe import SiteObserver
from stepfold.ir.program import Program
from stepfold.loop.errors import UsageError
from stepfold.passes.base import silent
from stepfold.passes.quantize import sequence
from stepfold.passes.quantize.algebra.errors import drift
from stepfold.passes.quantize.inputs import Inputs
from stepfold.passes.quantize.layers import Group, Selection, find_groups
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize
from stepfold.passes.quantize.realize import Realization
from stepfold.passes.quantize.rewrite import replaced
from stepfold.passes.quantize.schemes.blocks import Int4
from stepfold.passes.quantize.sequence import SideBySide, affordable, realized_in_sequence

M = 32


class Chain(nn.Module):
    """Linear layers one after the other, a function between them, and one behind the last."""

    def __init__(self, layers: int = 2, between: Callable[[torch.Tensor], torch.Tensor] = torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(M, M) for _ in range(layers))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, M] -> [B, T, M]."""
        for layer in self.layers:
            x = self.between(layer(x))
        return x


def rows_of(seed: int, samples: int = 8) -> torch.Tensor:
    """[B, 32, M] correlated rows, a few channels of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(M, M, generator=torch.Generator().manual_seed(9)) / M**0.5
    x = torch.randn(samples, 32, M, generator=generator) @ mixing
    return x * torch.where(torch.arange(M) % 11 == 3, 8.0, 1.0)


def chain(layers: int = 2, between: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> Program:
    return component(Chain(layers, between), rows_of(1))


def groups_of(program: Program) -> list[Group]:
    groups, _ = find_groups(program.step, Selection(("*",), (), 1), lambda layer: None)
    return groups


class Recorder:
    """Realizes with int4 and remembers what each group was said to read; `left` names groups that are left alone."""

    def __init__(self, left: frozenset[str] = frozenset()):
        self.scheme = Int4(QuantizeOptions(scheme="int4", rounding="sequential-gptq", group=16))
        self.left = left
        self.inputs: dict[str, Inputs] = {}

    def __call__(self, group: Group, inputs: Inputs | None) -> Realization | None:
        assert inputs is not None
        self.inputs[group.name] = inputs
        return None if group.name in self.left else self.scheme.realize(group, inputs)


def run(program: Program, realize: Recorder) -> list[Realization | None]:
    return realized_in_sequence(program, groups_of(program), {}, realize, 0, silent)


def read_by(program: Program, name: str) -> torch.Tensor:
    """What a layer in floats reads on the example."""
    seen: list[torch.Tensor] = []
    group = next(group for group in groups_of(program) if group.name == name)
    with torch.no_grad():
        SiteObserver(program.step.graph, {group.source: seen.append}).run(*program.example.values())
    return seen[0]


def quantized(program: Program, cache: Path, **options: Any) -> Program:
    operation = Quantize(QuantizeOptions.model_validate({"scheme": "int4", "group": 16, **options}))
    return operation.run(program, context_of(program, cache)).program


# -- which moments


def test_a_layer_is_rounded_for_what_the_quantized_one_before_it_leaves() -> None:
    program, recorder = chain(), Recorder()
    first, second = groups_of(program)
    realizations = run(program, recorder)
    behind = replaced(program, [first], realizations[:1])
    wanted = mean_gram(read_by(behind, second.name).flatten(0, 1))
    received, before = recorder.inputs[second.name].gram(), mean_gram(read_by(program, second.name).flatten(0, 1))
    assert drift(received, wanted) < 1e-6 and drift(received, before) > 1e-3
    assert drift(recorder.inputs[first.name].gram(), mean_gram(rows_of(1).flatten(0, 1))) < 1e-6


def test_rows_and_ranges_are_of_the_same_value() -> None:
    program, recorder = chain(), Recorder()
    realizations = run(program, recorder)
    first, second = groups_of(program)
    value = read_by(replaced(program, [first], realizations[:1]), second.name).flatten(0, 1)
    inputs = recorder.inputs[second.name]
    assert torch.equal(inputs.low[0], value.amin(dim=0)) and torch.equal(inputs.high[0], value.amax(dim=0))
    found = {tuple(row) for row in value.tolist()}
    assert {tuple(row) for row in inputs.rows().tolist()} <= found and len(inputs.rows()) == len(value)


def test_known_ranges_are_widened_and_not_replaced() -> None:
    program, recorder = chain(), Recorder()
    known = {
        group.key: Inputs(torch.full((2, M), -1e3), torch.zeros(2, M), torch.ones(M)) for group in groups_of(program)
    }
    realized_in_sequence(program, groups_of(program), known, recorder, 0, silent)
    for inputs in recorder.inputs.values():
        assert (inputs.low == -1e3).all() and (inputs.high[0] > 0).any() and inputs.low.shape == (2, M)


def test_a_layer_that_is_left_leaves_what_it_left() -> None:
    program = chain()
    first, second = groups_of(program)
    recorder = Recorder(frozenset({first.name}))
    assert [item is None for item in run(program, recorder)] == [True, False]
    assert drift(recorder.inputs[second.name].gram(), mean_gram(read_by(program, second.name).flatten(0, 1))) < 1e-6


def test_a_batch_that_is_not_first() -> None:
    """Rows are rows: [T, B, M] has the Gram of [B, T, M]."""
    program = component(nn.Sequential(Turned(), nn.Linear(M, M), nn.Tanh()), rows_of(1))
    recorder = Recorder()
    run(program, recorder)
    (inputs,) = recorder.inputs.values()
    assert drift(inputs.gram(), mean_gram(rows_of(1).flatten(0, 1))) < 1e-6


class Turned(nn.Module):
    """[B, T, M] -> [T, B, M]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, M] -> [T, B, M]."""
        return x.transpose(0, 1) + 0


# -- what it gains


class Narrow(nn.Module):
    """What the second layer reads has rank 2; the rounding errors of the first lie in all directions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 128, bias=False), nn.Linear(128, 128, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(128, 2) @ torch.randn(2, 64) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, 64] -> [B, T, 128]."""
        return torch.tanh(self.second(self.first(x)))


def test_a_layer_errs_less_on_what_it_really_reads(tmp_path: Path) -> None:
    """On rows that chose nothing; measured 0.85 of its error under the moments of the float program."""
    train, test = torch.randn(2, 8, 128, 64, generator=torch.Generator().manual_seed(10))
    program = component(Narrow(), train)
    weight = groups_of(program)[1].weight
    errors = []
    for rounding in ("gptq", "sequential-gptq"):
        graph = quantized(program, tmp_path, rounding=rounding).step.graph
        layer = graph.graph.find_nodes(op="call_function", target=torch.ops.stepfold.blocked_linear.default)[1]
        seen: list[torch.Tensor] = []
        with torch.no_grad():
            SiteObserver(graph, {layer.args[0]: seen.append, layer: seen.append}).run(test)
        errors.append(drift(seen[1], seen[0] @ weight.T))
    assert errors[1] < 0.93 * errors[0]


def test_the_output_error_is_not_larger_where_the_layers_before_err(tmp_path: Path) -> None:
    """Most of it is of the layers before, which the last cannot take back: measured 0.99 of the error."""
    program, test = chain(3, torch.relu), rows_of(2)
    rounded = [quantized(program, tmp_path, rounding=rounding) for rounding in ("gptq", "sequential-gptq")]
    with torch.no_grad():
        wanted, together, in_order = (p.step.graph(test)[0] for p in (program, *rounded))
    assert 0.01 < drift(in_order, wanted) <= drift(together, wanted)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    program = chain()
    first, second = (quantized(program, tmp_path, rounding="sequential-gptq").step.tensors() for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- memory


def test_only_values_that_are_still_read_are_held() -> None:
    program = chain(6)
    run = SideBySide(program.step, [{"x": rows_of(1).numpy()}])
    most = 0
    for node in run.graph.graph.nodes:
        if node.op != "output":
            run.compute(node)
            values = [value for at, value in run.runs[0].env.items() if at.op != "get_attr"]
            most = max(most, sum(value.nbytes for value in values))
    assert most <= 3 * rows_of(1).numel() * 4, "the input, a value and what is made of it"


def test_fewer_evaluations_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    program = denoiser(Timed(), rows_of(1)[:2], torch.full((2,), 500.0))
    assert affordable(program) == (8, 20)
    one = peak_bytes(program.step, 1)
    for cells, expected in ((0, (1, 1)), (7, (1, 7)), (65, (3, 20)), (10**6, (8, 20))):
        monkeypatch.setattr(sequence, "LIVE_BYTES", cells * one)
        assert affordable(program) == expected


class Timed(nn.Module):
    """A layer, and the timestep added."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(M, M)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x [B, T, M], t [B] -> [B, T, M]."""
        return torch.tanh(self.layer(x) + t[:, None, None] / 1000)


# -- what it refuses


def test_too_few_rows() -> None:
    program = component(Chain(), rows_of(1, samples=3))
    with pytest.raises(
        UsageError,
        match=r"site layers\.0: expected at least 4 rows for each of 32 channels.*received 96\. Choose rounding: gptq",
    ):
        run(program, Recorder())


def test_repair_wants_to_know_weights_beforehand() -> None:
    options = {"scheme": "int4", "rounding": "sequential-gptq", "repair": "data-free"}
    with pytest.raises(UsageError, match="'repair': expected null with rounding sequential-gptq"):
        QuantizeOptions.model_validate(options)
