"""A graph TensorRT refuses: what the user is told, and the part that is kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from tensorrt_stages import SM89, block, needs_rtx, stage_of, symmetric_int8
from torch import fx

from stepfold.backends.tensorrt import lower as lowering
from stepfold.backends.tensorrt import refusal
from stepfold.backends.tensorrt.build import BuildFailure, check
from stepfold.backends.tensorrt.lower import lower, prepare
from stepfold.backends.tensorrt.network import ParserRefusal, RefusedNode
from stepfold.backends.tensorrt.options import TensorrtOptions
from stepfold.backends.tensorrt.provider import RTX, Message
from stepfold.ir.edit import copy_graph, finish
from stepfold.ir.operators import RECORDS
from stepfold.ir.program import Stage
from stepfold.loop.errors import StepfoldError

stepfold = torch.ops.stepfold


class Determinant(torch.nn.Module):
    """x [B, 3, 3] -> [B]; no engine of NVIDIA has a determinant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(x)


class Model(torch.nn.Module):
    """Layers around the operator that is refused: x [B, 3, 3] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        self.volume = Determinant()
        self.after = torch.nn.Linear(1, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.relu(self.volume(self.before(x)))[:, None])


@needs_rtx
def test_node_module_line_and_the_smallest_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "plan"
    folder.mkdir()
    with pytest.raises(StepfoldError) as raised:
        lower(stage_of(Model(), torch.randn(2, 3, 3)), folder, SM89)
    said = str(raised.value)
    line = Determinant.forward.__code__.co_firstlineno + 1
    where = (
        rf"stage step: tensorrt_rtx refuses Det node \S+ \(volume; \S+test_refusal.py:{line}: return torch.linalg.det"
    )
    assert re.match(where, said), said
    assert "it has no form for this operator" in said
    found = re.search(r"smallest part that fails has 1 of (\d+) nodes \(Det\): (\S+\.onnx)", said)
    assert found is not None and int(found[1]) > 5
    part = onnx.load(found[2])
    assert [node.op_type for node in part.graph.node] == ["Det"] and not part.graph.initializer
    with pytest.raises(ParserRefusal):
        check(RTX, Path(found[2]).read_bytes())
    assert list(folder.iterdir()) == []
    assert "Det" in shown_again(Path(found[2])), "the command of the documentation"


def shown_again(part: Path) -> str:
    """What Polygraphy says of a part that was refused."""
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'stepfold[tensorrt]'")
    words = ("convert", part, "-o", part.with_suffix(".engine"), "--strongly-typed", "--compute-capabilities", "8.9")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from polygraphy.tools._main import main; sys.exit(main())",
            *map(str, words),
        ],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


@needs_rtx
@pytest.mark.slow
def test_a_network_that_cannot_be_built_is_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Attention in float32 parses, and the builder has no kernel for it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    monkeypatch.setattr(lowering, "LOWERINGS", {key: f for key, f in lowering.LOWERINGS.items() if key is not sdpa})
    with pytest.raises(StepfoldError, match=r"tensorrt_rtx cannot build the network: .*Attention operation") as raised:
        lower(block(), tmp_path, SM89)
    found = re.search(r"smallest part that fails has (\d+) of (\d+) nodes \((.*)\): ", str(raised.value))
    assert found is not None and (found[1], found[3]) == ("1", "Attention")


def test_memory_that_runs_out_is_named_and_not_reduced() -> None:
    messages = [Message("INFO", "x"), Message("ERROR", "[resizer.cpp] OutOfMemory (no further information)")]
    said = refusal.explained(BuildFailure(messages), RTX, Path("missing.onnx"), SM89)
    assert "building ran out of memory: [resizer.cpp] OutOfMemory" in said and "lower tensorrt.max_batch" in said


@pytest.mark.parametrize(
    ("trace", "source"),
    [
        ("", "no source line"),
        ('File "a.py", line 1, in f\n    g(x)\n  File "b.py", line 20, in g\n    return x\n', "b.py:20: return x"),
        ('File "a.py", line 1, in f\n    g(x)\n  File "b.py", line 20, in g\n', "b.py:20"),
    ],
)
def test_the_innermost_source_line(trace: str, source: str) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="r")
    node.metadata_props.add(key=refusal.TRACE, value=trace)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    assert refusal._described(model, RefusedNode("r", "Relu", "why")) == f"Relu node r (top level; {source}): why"


def test_a_build_that_gives_no_reason() -> None:
    assert str(BuildFailure([Message("INFO", "x")])) == "it gives no reason"


def test_a_large_model_is_not_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "LARGEST_BYTES", 10)
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="r")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:])), tmp_path / "m.onnx")
    said = refusal.explained(BuildFailure([Message("ERROR", "no kernel")]), RTX, tmp_path / "m.onnx", SM89)
    assert said.endswith("no kernel. The failing part was not looked for: the weights exceed a gigabyte.")


def quantized(operator: str, *weights: torch.Tensor) -> Stage:
    """A linear layer with quantized activations, as the pass writes it."""
    stage = symmetric_int8(stage_of(torch.nn.Linear(4, 3), torch.randn(2, 4)))
    graph = copy_graph(stage)
    (node,) = graph.graph.find_nodes(op="call_function", target=stepfold.quantize_static.default)
    if operator == "quantize_dynamic":
        (product,) = node.users
        with graph.graph.inserting_before(node):
            triple = graph.graph.call_function(stepfold.quantize_dynamic.default, (node.args[0],))
            parts = [graph.graph.call_function(__import__("operator").getitem, (triple, i)) for i in range(3)]
        product.args = (*parts, *product.args[3:])
        graph.graph.erase_node(node)
    else:
        setattr(graph, str(node.args[2].target), weights[0])
    return finish(stage, graph)


def test_scales_of_run_time_are_refused() -> None:
    with pytest.raises(
        StepfoldError, match=r"with a stored scale and zero point 0, .*; received scales of run time"
    ) as e:
        prepare(quantized("quantize_dynamic"), SM89)
    assert "(quantize.activations=dynamic)" in str(e.value) and "--set quantize.activations=symmetric" in str(e.value)


@pytest.mark.parametrize(
    ("zero", "received"),
    [
        (torch.tensor(100, dtype=torch.uint8), "received uint8 with zero point 100"),
        (torch.tensor(0, dtype=torch.uint8), "received uint8 with zero point 0"),
        (torch.tensor(3, dtype=torch.int8), "received int8 with zero point 3"),
    ],
)
def test_zero_points_are_refused(zero: torch.Tensor, received: str) -> None:
    with pytest.raises(StepfoldError, match=received):
        prepare(quantized("quantize_static", zero), SM89)


def test_a_scale_that_is_computed_is_refused() -> None:
    stage = symmetric_int8(stage_of(torch.nn.Linear(4, 3), torch.randn(2, 4)))
    graph = copy_graph(stage)
    (node,) = graph.graph.find_nodes(op="call_function", target=stepfold.quantize_static.default)
    with graph.graph.inserting_before(node):
        scale = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[1], 2.0))
    node.args = (node.args[0], scale, node.args[2])
    with pytest.raises(StepfoldError, match="received a scale that is chosen at run time"):
        prepare(finish(stage, graph), SM89)


def test_every_operator_is_lowered_or_refused() -> None:
    """What has no lowering is refused by the emission; quantize_dynamic is refused with advice."""
    own = {operator for operator, record in RECORDS.items() if record.portable is None}
    missing = [operator for operator in own if operator not in lowering.LOWERINGS]
    assert stepfold.quantize_dynamic.default in missing
    for operator in missing:
        graph = fx.Graph()
        graph.output((graph.call_function(operator, (graph.placeholder("x"),)),))
        from stepfold.backends.onnx.emit import lowered
        from stepfold.loop.ports import Rate

        stage = Stage("one", Rate.STEP, fx.GraphModule(torch.nn.Module(), graph), (), ())
        with pytest.raises(StepfoldError, match=r"has no lowering for this engine"):
            lowered(stage, lowering.LOWERINGS)


def test_options_of_another_precision_are_prepared() -> None:
    half = prepare(block(), TensorrtOptions(capability="SM89", precision="fp16"))
    assert any(tensor.dtype is torch.float16 for tensor in half.tensors().values())
