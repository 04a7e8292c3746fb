"""The scheme `modelopt` of the quantize pass, with decisions that stand in for those of modelopt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from programs import Program, component, context_of, operators

from stepfold.ir.program import attribute
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.loop.metrics import drift
from stepfold.passes.base import PassResult
from stepfold.passes.quantize.modelopt.read import FLOAT8, LinearDecision, QuantizedInput, QuantizedWeight
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize
from stepfold.passes.quantize.schemes import modelopt

LINEAR = torch.ops.aten.linear.default


class Network(torch.nn.Module):
    """Two layers that read one value, one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.last(torch.tanh(self.first(x) + self.second(x))))


@pytest.fixture
def program() -> Program:
    return component(Network(), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)))


def run(program: Program, folder: Path, **options: Any) -> PassResult:
    operation = Quantize(QuantizeOptions.model_validate({"scheme": "modelopt", **options}))
    return operation.run(program, context_of(program, folder))


def decisions_of(
    program: Program, excluded: tuple[str, ...], scale: Callable[[int], float]
) -> dict[str, LinearDecision]:
    """Weights by their largest magnitude, inputs under a scale for each layer."""
    found = {}
    for i, node in enumerate(program.step.graph.graph.find_nodes(op="call_function", target=LINEAR)):
        if node.name not in excluded:
            weight = attribute(program.step.graph, str(node.args[1].target)).detach().numpy().T
            step = np.abs(weight).max(0) / 127
            codes = np.rint(weight / step).astype(np.int8)
            zero = np.zeros(8, np.int32)
            held = QuantizedWeight(codes, step.astype(np.float32), zero, "int8")
            found[node.name] = LinearDecision(QuantizedInput(scale(i), 0, "int8"), held)
    return found


def stand_in(monkeypatch: pytest.MonkeyPatch, scale: Callable[[int], float] = lambda i: 4 / 127) -> list[Any]:
    """Decide here; returns the settings that were received."""
    seen: list[Any] = []

    def decide(program: Program, python: Path, quantizer: Any, *rest: Any) -> dict[str, LinearDecision]:
        seen.append((python, quantizer))
        return decisions_of(program, quantizer.excluded, scale)

    monkeypatch.setattr(modelopt, "decide", decide)
    monkeypatch.setattr(modelopt, "find", lambda cache: cache / "python")
    return seen


def test_decisions_become_integer_products(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stand_in(monkeypatch)
    result = run(program, tmp_path)
    assert result.details["sites"] == ["first", "second", "last"]
    found = operators(result.program.step)
    assert found.count("stepfold.quantize_static.default") == 2 and found.count("stepfold.qlinear.default") == 3
    example = tuple(program.example.values())
    with torch.no_grad():
        received, wanted = (p.step.graph(*example)[0].numpy() for p in (result.program, program))
    assert 0 < drift(received, wanted) < 0.03
    assert seen[0][0] == tmp_path / "python" and seen[0][1].excluded == ()


def fp8_decision(weight: np.ndarray) -> LinearDecision:
    """Weights [M, N] in E4M3 by their largest magnitude."""
    scale = (np.abs(weight).max(0) / 448).astype(np.float32)
    held = QuantizedWeight((weight / scale).astype(ml_dtypes.float8_e4m3fn), scale, np.zeros(8, np.int32), FLOAT8)
    return LinearDecision(QuantizedInput(4 / 448, 0, FLOAT8), held)


def int4_decision(weight: np.ndarray) -> LinearDecision:
    """Weights [M, N] in one group of 16, which the 8 inputs do not fill."""
    scale = (np.abs(weight).max(0, keepdims=True) / 7).astype(np.float32)
    codes = np.clip(np.rint(weight / scale), -8, 7).astype(np.int8)
    return LinearDecision(None, QuantizedWeight(codes, scale, np.zeros((1, 8), np.int32), "int4", 16))


@pytest.mark.parametrize(
    ("format", "decision", "operator"),
    [("fp8", fp8_decision, "stepfold.decode_fp8.default"), ("int4", int4_decision, "stepfold.blocked_linear.default")],
)
def test_other_formats(
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    decision: Callable[[np.ndarray], LinearDecision],
    operator: str,
) -> None:
    """The stage computes what the dequantized weights give, with the input rounded where it is."""
    seen = stand_in(monkeypatch)
    weights = {
        node.name: attribute(program.step.graph, str(node.args[1].target)).detach().numpy().T
        for node in program.step.graph.graph.find_nodes(op="call_function", target=LINEAR)
    }
    decisions = {name: decision(weight) for name, weight in weights.items()}
    monkeypatch.setattr(modelopt, "decide", lambda program, python, quantizer, *_: seen.append(quantizer) or decisions)
    result = run(program, tmp_path, format=format)
    assert seen[0].mode == format and result.changed == 3
    found = operators(result.program.step)
    assert found.count(operator) == 3 and found.count("stepfold.round_fp8.default") == (2 if format == "fp8" else 0)
    with torch.no_grad():
        received = result.program.step.graph(*program.example.values())[0].numpy()
    wanted = by_hand(program.example["x"], decisions)
    np.testing.assert_allclose(received, wanted, atol=1e-6)


def by_hand(x: torch.Tensor, decisions: Mapping[str, LinearDecision]) -> np.ndarray:
    """The network with the weights that decisions stand for."""
    network = Network()

    def layer(value: torch.Tensor, module: torch.nn.Linear, decision: LinearDecision) -> torch.Tensor:
        if decision.input is not None:
            scale = decision.input.scale
            value = (value / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        weight = torch.from_numpy(decision.weight.dequantized().astype(np.float32))
        return value @ weight + module.bias

    first, second, last = decisions.values()
    with torch.no_grad():
        hidden = torch.tanh(layer(x, network.first, first) + layer(x, network.second, second))
        return torch.tanh(layer(hidden, network.last, last)).numpy()


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("fp8", "expected an E4M3 input and an E4M3 weight"),
        ("int4", "expected a float input and a symmetric int4 weight in groups"),
    ],
)
def test_a_decision_in_another_form(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, expected: str
) -> None:
    stand_in(monkeypatch)  # which decides in int8
    with pytest.raises(StepfoldError, match=f"layer first: {expected}.*; received input int8, weight int8"):
        run(program, tmp_path, format=format)


def test_layers_that_the_recipe_leaves_are_excluded(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = stand_in(monkeypatch)
    result = run(program, tmp_path, skip=["second"], smooth=0.5)
    assert result.details["sites"] == ["first", "last"] and len(seen[0][1].excluded) == 1


def test_one_value_has_one_scale(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda i: (4 + i) / 127)
    with pytest.raises(StepfoldError, match="expected one scale for the input of first and its neighbours; received 2"):
        run(program, tmp_path)


def test_a_layer_without_a_decision(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    monkeypatch.setattr(modelopt, "decide", lambda *_: {})
    with pytest.raises(StepfoldError, match="expected a decision for every chosen layer; none came for linear"):
        run(program, tmp_path)


def test_without_an_environment(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPFOLD_MODELOPT_PYTHON", raising=False)
    with pytest.raises(UsageError, match=r"python -m stepfold\.passes\.quantize\.modelopt\.environment"):
        run(program, tmp_path)
