"""What layers cost on an engine: measured alone, once for each shape, and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import component, context_of, operators

from stepfold.ir.program import Program
from stepfold.loop.errors import UsageError
from stepfold.loop.ports import BoundProgram
from stepfold.passes.base import Context
from stepfold.passes.quantize.durations import Durations, Formats, lone_stage
from stepfold.passes.quantize.layers import Group, Selection, find_groups
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize
from stepfold.passes.quantize.schemes.blocks import Int8Weights


class Network(torch.nn.Module):
    """Two layers that read one value, two of one shape behind them, one whose bias is computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = torch.nn.Linear(32, 16), torch.nn.Linear(32, 48, bias=False)
        self.up, self.again = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.last = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.again(torch.tanh(self.up(torch.tanh(self.q(x)))))) + self.k(x)[..., :16]
        return torch.tanh(torch.nn.functional.linear(hidden, self.last.weight, self.last.bias * hidden.amax()))


@pytest.fixture(scope="module")
def program() -> Program:
    return component(Network(), torch.randn(2, 5, 32))


def groups_of(program: Program) -> dict[str, Group]:
    selection = Selection(("*",), (), 1, predicts=False)
    return {group.name: group for group in find_groups(program.step, selection, lambda layer: None)[0]}


def formats_of(group: Group) -> Formats:
    scheme = Int8Weights(QuantizeOptions(scheme="int8-weights", group=16))
    return {"float": None, "int8": scheme.realize(group, None)}


def counting(program: Program, cache: Path) -> tuple[Context, list[Program]]:
    """A context whose engine says what it was given."""
    seen: list[Program] = []

    def engine(given: Program) -> BoundProgram:
        seen.append(given)
        return given.bind()

    return replace(context_of(program, cache), engine=engine, fitted_on="engine"), seen


def test_a_lone_stage_computes_the_layers_of_a_group(program: Program) -> None:
    before = operators(program.step)
    stage = lone_stage(groups_of(program)["q"], None)
    assert [port.shape for port in (*stage.inputs, *stage.outputs)] == [(None, 5, 32), (None, 5, 16), (None, 5, 48)]
    x, network = torch.randn(3, 5, 32), Network()
    with torch.no_grad():
        for received, layer in zip(stage.graph(x), (network.q, network.k), strict=True):
            np.testing.assert_allclose(received, layer(x), atol=1e-6)
    assert operators(program.step) == before


def test_a_lone_stage_holds_the_realization(program: Program) -> None:
    group = groups_of(program)["q"]
    found = operators(lone_stage(group, formats_of(group)["int8"]))
    assert found == ["stepfold.blocked_linear.default"] * 2


def test_a_bias_that_is_computed_is_left_out(program: Program) -> None:
    (group,) = (group for group in groups_of(program).values() if group.source.target is torch.ops.aten.add.Tensor)
    stage = lone_stage(group, None)
    assert operators(stage) == ["linear.default"] and len(stage.tensors()) == 1


def test_each_shape_is_measured_once(program: Program, tmp_path: Path) -> None:
    context, seen = counting(program, tmp_path)
    durations, groups = Durations(context), groups_of(program)
    first = durations.of(groups["up"], formats_of(groups["up"]))
    assert first.keys() == {"float", "int8"} and all(isinstance(value, int) and value > 0 for value in first.values())
    assert len(seen) == 2
    assert durations.of(groups["again"], formats_of(groups["again"])) == first and len(seen) == 2
    durations.of(groups["q"], formats_of(groups["q"]))
    assert len(seen) == 4
    other, _ = counting(program, tmp_path)
    assert Durations(other).of(groups["up"], formats_of(groups["up"])) == first


def test_a_damaged_duration_is_measured_again(program: Program, tmp_path: Path) -> None:
    context, seen = counting(program, tmp_path)
    group = groups_of(program)["up"]
    Durations(context).of(group, formats_of(group))
    (file,) = (tmp_path / "durations").glob("*/durations.json")
    file.write_text('{"float": 1')
    assert Durations(context).of(group, formats_of(group)).keys() == {"float", "int8"} and len(seen) == 4


def test_another_engine_is_measured_again(program: Program, tmp_path: Path) -> None:
    context, seen = counting(program, tmp_path)
    group = groups_of(program)["up"]
    Durations(context).of(group, formats_of(group))
    Durations(replace(context, engine_name="another")).of(group, formats_of(group))
    assert len(seen) == 4


def test_an_engine_that_does_not_run_here(program: Program, tmp_path: Path) -> None:
    context, _ = counting(program, tmp_path)
    with pytest.raises(UsageError, match=r"option 'time': expected an engine that runs on this machine; reference"):
        Durations(replace(context, fitted_on="reference"))


# -- whether integers pay


def asked(monkeypatch: pytest.MonkeyPatch, times: dict[str, int]) -> list[str]:
    """Let every measurement give these times; returns the groups that were measured."""
    groups: list[str] = []

    def of(self: Durations, group: Group, formats: Formats) -> dict[str, int]:
        groups.append(group.name)
        return times

    monkeypatch.setattr(Durations, "of", of)
    return groups


@pytest.mark.parametrize(("int8", "shown", "times"), [(3_200_000, "3.2", 1.6), (1_900_000, "1.9", 0.95)])
def test_integers_that_are_hardly_faster_than_floats_are_said_to_be(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    int8: int,
    shown: str,
    times: float,
) -> None:
    """The group with most products, q and k, stands for all."""
    measured = asked(monkeypatch, {"float": 2_000_000, "int8": int8})
    context = replace(context_of(program, tmp_path), fitted_on="engine", engine_name="openvino")
    details = Quantize(QuantizeOptions()).run(program, context).details
    assert details["does_not_pay"] == {"layers": "q", "times": times} and measured == ["q"]
    assert f"int8 does not pay on openvino on this processor: q took {shown} ms against 2.0 ms in float" in caplog.text


@pytest.mark.parametrize(("fitted_on", "int8", "count"), [("engine", 1_700_000, 1), ("reference", 9_000_000, 0)])
def test_nothing_is_said_where_they_pay_or_where_the_engine_cannot_run(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fitted_on: str, int8: int, count: int
) -> None:
    measured = asked(monkeypatch, {"float": 2_000_000, "int8": int8})
    context = replace(context_of(program, tmp_path), fitted_on=fitted_on)  # type: ignore[arg-type]
    assert "does_not_pay" not in Quantize(QuantizeOptions()).run(program, context).details
    assert len(measured) == count


def test_only_schemes_that_are_there_for_speed_are_timed(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = asked(monkeypatch, {})
    context = replace(context_of(program, tmp_path), fitted_on="engine")
    Quantize(QuantizeOptions(scheme="int8-weights", group=16)).run(program, context)
    assert measured == []
