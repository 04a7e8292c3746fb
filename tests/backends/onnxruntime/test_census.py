"""What ONNX Runtime makes of quantized layers: integer products, or the trap of a float one behind a dequantization."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from programs import component, context_of

from stepfold.backends.onnx import emit as emission
from stepfold.backends.onnxruntime import census as counting
from stepfold.backends.onnxruntime import lower as lowering
from stepfold.backends.onnxruntime.census import (
    INTEGER_PRODUCTS,
    census,
    optimized_model,
    quantized_layers,
    require_integer_products,
)
from stepfold.ir.program import Program, Stage
from stepfold.loop.errors import StepfoldError
from stepfold.passes.manager import run_passes
from stepfold.passes.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[3]
M, N = 32, 16
WEIGHT = np.random.default_rng(0).integers(-127, 128, (M, N)).astype(np.int8)
ARRAYS = {
    "x_scale": np.array(0.02, np.float32),
    "x_zero": np.array(128, np.uint8),
    "weight": WEIGHT,
    "weight_scale": np.linspace(0.001, 0.002, N, dtype=np.float32),
    "weight_zero": np.zeros(N, np.int8),
    "bias": np.ones(N, np.float32),
    "bias_int32": np.arange(N, dtype=np.int32),
    "bias_scale": np.linspace(2e-5, 4e-5, N, dtype=np.float32),
    "turned": np.ascontiguousarray(WEIGHT.T),
}
QDQ = [
    helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["x_back"]),
]
WEIGHT_DQ = helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], axis=1)
PRODUCT = helper.make_node("MatMul", ["x_back", "w"], ["product"], name="the_product")
FLOAT_BIAS = helper.make_node("Add", ["product", "bias"], ["y"])
TRAP = [*QDQ, WEIGHT_DQ, PRODUCT, FLOAT_BIAS]


def model_of(nodes: list[onnx.NodeProto], output: str, domain: str = "") -> onnx.ModelProto:
    """A model of x [B, M] float32; weights are those of `ARRAYS` that the nodes read."""
    read = {name for node in nodes for name in node.input}
    weights = [numpy_helper.from_array(array, name) for name, array in ARRAYS.items() if name in read]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", M])
    y = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [x], [y], weights)
    opsets = [helper.make_opsetid("", 21), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def saved(folder: Path, nodes: list[onnx.NodeProto], output: str = "y", **more: Any) -> Path:
    onnx.save_model(model_of(nodes, output, **more), str(folder / "model.onnx"))
    return folder / "model.onnx"


def quantized(program: Program, folder: Path, *passes: Any) -> Program:
    """The program after these passes of a recipe."""
    return run_passes(program, load_recipe({"passes": list(passes)}).steps(), context_of(program, folder))


class Twice(torch.nn.Module):
    """Two layers one behind the other; the first is not the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.relu(self.first(x)))))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Two quantized layers of three."""
    program = component(Twice(), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)))
    return quantized(program, tmp_path_factory.mktemp("unused"), {"quantize": {}}).step


# -- models by hand


def test_the_trap_is_found(tmp_path: Path) -> None:
    """Quantize and dequantize pairs, MatMul, and a float Add: one float Gemm that dequantizes at every call."""
    found = census(optimized_model(saved(tmp_path, TRAP)))
    assert found.counts["Gemm"] == 1 and found.integer_products == 0
    (trapped,) = found.trapped
    assert trapped.startswith("Gemm ") and "q" in trapped and "weight" in trapped


def test_without_the_add_there_is_none(tmp_path: Path) -> None:
    """The engine makes the same pairs an integer product when nothing is added in float."""
    found = census(optimized_model(saved(tmp_path, [*QDQ, WEIGHT_DQ, PRODUCT], "product")))
    assert found.trapped == () and found.integer_products == 1
    assert found.counts["MatMulIntegerToFloat"] == 1 and "weight" in found.integer_inputs


@pytest.mark.parametrize("side", ["weight", "activation"])
def test_one_side_behind_layout_operators(side: str) -> None:
    """Without the engine: a product is trapped when either side is dequantized, however it is turned afterwards."""
    turned = [
        helper.make_node("DequantizeLinear", ["turned", "weight_scale", "weight_zero"], ["v"], axis=0),
        helper.make_node("Transpose", ["v"], ["t"], perm=[1, 0]),
        helper.make_node("Cast", ["t"], ["c"], to=TensorProto.FLOAT),
    ]
    cut = [*QDQ, helper.make_node("Reshape", ["x_back", "shape"], ["r"])]
    nodes = (
        [*turned, helper.make_node("FusedMatMul", ["x", "c"], ["y"], name="p", domain="com.microsoft")]
        if side == "weight"
        else [*cut, helper.make_node("Gemm", ["r", "bias"], ["y"], name="p")]
    )
    (trapped,) = census(model_of(nodes, "y", "com.microsoft")).trapped
    assert trapped == {"weight": "FusedMatMul p (of turned)", "activation": "Gemm p (of q)"}[side]


def test_a_dequantized_bias_or_float_product_is_no_trap() -> None:
    bias = helper.make_node("DequantizeLinear", ["bias_int32", "bias_scale"], ["b"])
    nodes = [bias, helper.make_node("Gemm", ["x", "w", "b"], ["y"]), helper.make_node("MatMul", ["y", "y"], ["z"])]
    found = census(model_of(nodes, "z"))
    assert found.trapped == () and found.counts == {"DequantizeLinear": 1, "Gemm": 1, "MatMul": 1}


def test_branches_are_counted() -> None:
    branch = helper.make_graph([*QDQ, WEIGHT_DQ, PRODUCT], "branch", [], [])
    found = census(model_of([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], "y"))
    assert found.counts["MatMul"] == 2 and len(found.trapped) == 2


@pytest.mark.parametrize("operator", sorted(INTEGER_PRODUCTS))
def test_every_integer_product_counts(operator: str) -> None:
    found = census(model_of([helper.make_node(operator, ["x", "weight"], ["y"], domain="com.microsoft")], "y"))
    assert found.integer_products == 1 and found.integer_inputs == {"x", "weight"}


# -- stages


def test_quantized_layers_and_their_weights(stage: Stage) -> None:
    layers = quantized_layers(stage)
    assert [layer.site for layer in layers] == ["first", "second"]
    assert all(stage.tensors()[layer.weight].dtype is torch.int8 for layer in layers)


def test_equal_calls_are_one_layer(tmp_path: Path) -> None:
    """The engine computes the same product once."""
    held = (torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8), torch.from_numpy(WEIGHT), torch.ones(N))

    def twice(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (torch.ops.stepfold.qlinear(q, *held, None) for _ in range(2))
        return first, second + 1

    step = component(twice, torch.zeros(2, 3, M, dtype=torch.uint8)).step
    assert len(quantized_layers(step)) == 1
    found = require_integer_products(step, lowering.lower(step, tmp_path))
    assert found is not None and found.integer_products == 1


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_lowered_stages_pass(activations: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = component(Twice(), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)))
    step = quantized(program, tmp_path, {"quantize": {"activations": activations}}).step
    with caplog.at_level(logging.INFO, logger="stepfold.backends.onnxruntime.census"):
        found = require_integer_products(step, lowering.lower(step, tmp_path))
    assert found is not None and found.integer_products == 2 and found.trapped == ()
    assert {layer.weight for layer in quantized_layers(step)} <= found.integer_inputs
    assert "stage forward: " in caplog.text and "MatMul" in caplog.text


def test_float_stages_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "optimized_model", lambda path: pytest.fail("opened"))
    step = component(Twice(), torch.randn(2, 5, 16)).step
    assert require_integer_products(step, lowering.lower(step, tmp_path)) is None


def test_a_trapped_stage_fails_the_build(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def emit_trap(stage: Stage, path: Path, lowerings: object) -> None:
        onnx.save_model(model_of(TRAP, "y"), str(path))

    monkeypatch.setattr(lowering, "emit", emit_trap)
    with pytest.raises(StepfoldError) as caught:
        lowering.lower(stage, tmp_path)
    text = str(caught.value)
    assert text.startswith("stage forward: expected 2 quantized layers to run in integers; ONNX Runtime runs 0 (none).")
    assert "Float products of dequantized integers: Gemm " in text
    assert "Layers without an integer product: first, second." in text
    assert "quantize.skip" in text


def test_a_layer_that_went_missing_fails_the_build(stage: Stage, tmp_path: Path) -> None:
    """One product for two layers: the message names the other one."""
    weight = quantized_layers(stage)[0].weight
    node = helper.make_node(
        "MatMulIntegerToFloat",
        ["q", weight, "x_scale", "weight_scale", "x_zero"],
        ["y"],
        domain="com.microsoft",
    )
    model = model_of([QDQ[0], node], "y", "com.microsoft")
    model.graph.initializer.append(numpy_helper.from_array(WEIGHT, weight))
    onnx.save_model(model, str(tmp_path / "one.onnx"))
    message = r"runs 1 \(MatMulIntegerToFloat 1\)\. Layers without an integer product: second\."
    with pytest.raises(StepfoldError, match=message):
        require_integer_products(stage, tmp_path / "one.onnx")


def test_a_file_that_does_not_load(stage: Stage, tmp_path: Path) -> None:
    path = saved(tmp_path, [helper.make_node("NoSuchOperator", ["x"], ["y"])])
    with pytest.raises(StepfoldError, match=r"model\.onnx: ONNX Runtime [\d.]+ cannot load the emitted file: "):
        require_integer_products(stage, path)


def test_weights_beside_the_file_and_nothing_left_behind(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emission, "EXTERNAL_DATA_BYTES", 64)
    (tmp_path / "stage").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    lowering.lower(stage, tmp_path / "stage")
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["forward.onnx", "forward.onnx.data"]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.slow
def test_the_reference_in_int8(reference_program: Program, tmp_path: Path) -> None:
    """Every quantized layer of the digits model is one integer product; q, k and v share one quantization."""
    step = quantized(reference_program, tmp_path, "hoist", {"quantize": {}}, "fuse").step
    layers = quantized_layers(step)
    found = require_integer_products(step, lowering.lower(step, tmp_path))
    assert found is not None and len(layers) >= 36
    assert found.integer_products == len(layers) and found.trapped == ()
    assert {layer.weight for layer in layers} <= found.integer_inputs
    assert "DequantizeLinear" not in found.counts
