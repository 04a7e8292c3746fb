"""Decisions as integer layers: what the Q/DQ model computes, in our operators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from programs import component, operators
from qdq import Builder, per_channel

from stepfold.ir.program import Program
from stepfold.loop.errors import StepfoldError
from stepfold.passes.quantize.modelopt.operands import integer_operands
from stepfold.passes.quantize.modelopt.read import LinearDecision, QuantizedInput, QuantizedWeight, read_decisions
from stepfold.passes.quantize.modelopt.realize import realize

SCALE = 0.03


class Pair(torch.nn.Module):
    """Two layers that read one value, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 6)
        self.second = torch.nn.Linear(4, 6, bias=False)
        self.last = torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) + self.second(x))


@pytest.fixture(scope="module")
def program() -> Program:
    return component(Pair(), torch.randn(2, 3, 4))


def layers(program: Program) -> list[str]:
    return [node.name for node in program.step.graph.graph.nodes if node.target is torch.ops.aten.linear.default]


def qdq_model(folder: Path, zero: np.ndarray) -> Path:
    """The module `Pair` as a Q/DQ model, products named `linear`, `linear_1`, `linear_2`."""
    module, builder = Pair(), Builder()

    def product(source: str, layer: torch.nn.Linear, name: str) -> str:
        weight = layer.weight.detach().numpy().T.copy()
        pair = builder.pair(
            builder.store(f"{name}_w", weight), per_channel(weight), np.zeros(weight.shape[1], np.int8), axis=1
        )
        return builder.node("MatMul", [source, pair], name)

    x = builder.pair("x", np.array(SCALE, np.float32), zero)
    first = builder.node(
        "Add", [product(x, module.first, "linear"), builder.store("b", module.first.bias.detach().numpy())], "first"
    )
    total = builder.node("Add", [first, product(x, module.second, "linear_1")], "total")
    hidden = builder.pair(total, np.array(2 * SCALE, np.float32), zero)
    builder.node(
        "Add", [product(hidden, module.last, "linear_2"), builder.store("c", module.last.bias.detach().numpy())], "y"
    )
    return builder.save(folder / "pair.onnx", ["y"])


@pytest.mark.parametrize("zero", [np.array(0, np.int8), np.array(-10, np.int8), np.array(120, np.uint8)], ids=str)
def test_computes_what_the_qdq_model_does(program: Program, tmp_path: Path, zero: np.ndarray) -> None:
    path = qdq_model(tmp_path, zero)
    stage = realize(program.step, read_decisions(path))
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(5)) * 2  # some of it saturates
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    wanted = np.asarray(onnxruntime.InferenceSession(str(path), options).run(None, {"x": x.numpy()})[0])
    with torch.no_grad():
        (received,) = stage.graph(x)
    np.testing.assert_allclose(received.numpy(), wanted, atol=1e-5)
    assert np.abs(wanted - Pair()(x).detach().numpy()).max() > 1e-3  # quantization did something


def test_layers_that_read_one_value_share_its_quantization(program: Program, tmp_path: Path) -> None:
    stage = realize(program.step, read_decisions(qdq_model(tmp_path, np.array(0, np.int8))))
    found = operators(stage)
    assert found.count("stepfold.quantize_static.default") == 2 and found.count("stepfold.qlinear.default") == 3
    assert "linear.default" not in found


def test_layers_without_a_decision_stay(program: Program, tmp_path: Path) -> None:
    decisions = read_decisions(qdq_model(tmp_path, np.array(0, np.int8)))
    stage = realize(program.step, {"linear_2": decisions["linear_2"]})
    found = operators(stage)
    assert found.count("linear.default") == 2 and found.count("stepfold.qlinear.default") == 1
    assert operators(program.step).count("linear.default") == 3  # the stage that was given is untouched


def test_different_scales_of_one_value_are_kept_apart(program: Program, tmp_path: Path) -> None:
    decisions = read_decisions(qdq_model(tmp_path, np.array(0, np.int8)))
    coarse = replace(decisions["linear_1"], input=QuantizedInput(0.5, 0, "int8"))
    found = operators(realize(program.step, {**decisions, "linear_1": coarse}))
    assert found.count("stepfold.quantize_static.default") == 3


def test_a_decision_for_an_unknown_layer(program: Program, tmp_path: Path) -> None:
    decisions = read_decisions(qdq_model(tmp_path, np.array(0, np.int8)))
    with pytest.raises(StepfoldError, match="expected decisions for its linear layers; received 'linear_9'"):
        realize(program.step, {"linear_9": decisions["linear"]})


CODES = np.ones((4, 6), np.int8)
WEIGHT = QuantizedWeight(CODES, np.ones(6, np.float32), np.zeros(6, np.int32), "int8")
INPUT = QuantizedInput(0.1, 3, "int8")


def test_signed_codes_become_unsigned() -> None:
    operands = integer_operands("a", LinearDecision(INPUT, WEIGHT))
    assert operands.zero.dtype == torch.uint8 and int(operands.zero) == 131
    assert operands.weight.dtype == torch.int8 and operands.weight_scale.shape == (6,)
    assert int(integer_operands("a", LinearDecision(replace(INPUT, dtype="uint8"), WEIGHT)).zero) == 3


@pytest.mark.parametrize(
    ("decision", "received"),
    [
        (LinearDecision(None, WEIGHT), "input float, weight int8"),
        (LinearDecision(replace(INPUT, dtype="float8_e4m3fn"), WEIGHT), "input float8_e4m3fn"),
        (LinearDecision(INPUT, replace(WEIGHT, dtype="int4", group=2)), "weight int4 in groups of 2"),
        (LinearDecision(INPUT, replace(WEIGHT, zero=np.ones(6, np.int32))), "weight int8"),
        (LinearDecision(INPUT, WEIGHT, np.ones(4, np.float32)), "weight int8"),
    ],
)
def test_other_forms_are_refused(decision: LinearDecision, received: str) -> None:
    with pytest.raises(StepfoldError, match="layer ff: expected an 8-bit integer input") as caught:
        integer_operands("ff", decision)
    assert received in str(caught.value) and "mode int8" in str(caught.value)
