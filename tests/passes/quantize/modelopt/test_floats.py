"""The float model that modelopt gets: named after the graph, and equal to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from programs import Program, component, modulated

from stepfold.backends.onnxruntime.session import open_session
from stepfold.loop.errors import StepfoldError
from stepfold.passes.quantize.modelopt import floats
from stepfold.passes.quantize.modelopt.floats import emit_floats

LINEAR = torch.ops.aten.linear.default


class Rows(torch.nn.Module):
    """A layer on rows without tokens (an exporter's Gemm), one that is called twice, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice = torch.nn.Linear(4, 4)
        self.bare = torch.nn.Linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bare(self.twice(torch.tanh(self.twice(x))))


@pytest.mark.parametrize("case", ["rows", "tokens", "denoiser"])
def test_products_have_the_names_of_the_layers(case: str, tmp_path: Path) -> None:
    if case == "denoiser":
        program: Program = modulated()
    else:
        program = component(Rows(), torch.randn(2, 4) if case == "rows" else torch.randn(2, 3, 4))
    stage = program.step
    wanted = [node.name for node in stage.graph.graph.nodes if node.target is LINEAR]
    path = tmp_path / "float.onnx"
    assert emit_floats(stage, path) == wanted
    model = onnx.load(str(path))
    assert [node.name for node in model.graph.node if node.op_type == "MatMul"] == wanted
    stored = {item.name: list(item.dims) for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul":  # [M, N], not a transposition at run time
            assert len(stored[node.input[1]]) == 2
    assert {node.domain for node in model.graph.node} == {""}
    inputs = {name: value.numpy() for name, value in program.example.items()}
    received = open_session(path, stage.inputs, stage.outputs, threads=1)(inputs)
    np.testing.assert_allclose(received[0], program.bind().evaluate(inputs)[0], atol=1e-5)


def test_the_stage_is_untouched(tmp_path: Path) -> None:
    stage = component(Rows(), torch.randn(2, 4)).step
    before = [str(node.target) for node in stage.graph.graph.nodes]
    emit_floats(stage, tmp_path / "float.onnx")
    assert [str(node.target) for node in stage.graph.graph.nodes] == before


def test_a_layer_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = component(Rows(), torch.randn(2, 4)).step
    monkeypatch.setattr(floats, "NAME", "other")  # what the renaming looks for, after the model has been written
    written = floats._named_linear

    def nameless(*arguments: object, name: str) -> object:
        return written(*arguments, name="linear_1" if name == "linear" else name)  # type: ignore[arg-type]

    monkeypatch.setattr(floats, "_named_linear", nameless)
    with pytest.raises(
        StepfoldError, match=r"float.onnx: expected one product for each linear layer; missing: linear\."
    ):
        emit_floats(stage, tmp_path / "float.onnx")
