"""The lowerings for TensorRT compute what the operators do; ONNX Runtime runs the emitted files in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from stages import floats, one_call
from tensorrt_stages import block, stage_of, symmetric_int8

from stepfold.backends.onnx.blocks import BLOCKED_LINEAR, with_signed_blocks
from stepfold.backends.onnx.emit import emit
from stepfold.backends.onnx.precision import at_precision
from stepfold.backends.onnxruntime.session import open_session
from stepfold.backends.tensorrt.lower import LOWERINGS
from stepfold.ir.program import Stage, reference
from stepfold.loop.metrics import drift
from stepfold.loop.ports import StageCallable

ops = torch.ops.stepfold
FLOAT = 1e-5


def opened(stage: Stage, folder: Path) -> StageCallable:
    emit(stage, folder / "stage.onnx", LOWERINGS, with_signed_blocks)
    return open_session(folder / "stage.onnx", stage.inputs, stage.outputs)


def run(stage: Stage, folder: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return opened(stage, folder)(inputs)[0]


def random(stage: Stage, batch: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch)
    return {
        port.name: generator.standard_normal([batch if n is None else n for n in port.shape]).astype(port.dtype)
        for port in stage.inputs
    }


def assert_near(stage: Stage, folder: Path, tolerance: float) -> None:
    call = opened(stage, folder)
    for batch in (1, 4):
        inputs = random(stage, batch)
        assert drift(call(inputs)[0], reference(stage)(inputs)[0]) < tolerance, batch


Q, K = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
HEADS = [torch.randn(2, 2, 5, 4), torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)]
sdpa = torch.nn.functional.scaled_dot_product_attention
MASK = torch.tensor([[True, False, True]]).expand(5, 3)
CASES: dict[str, tuple[Callable, list[torch.Tensor]]] = {
    "attention": (lambda q, k, v: ops.attention(q, k, v, 2, 0.5), [Q, K, K]),
    "rotary": (lambda x, c, s: ops.rotary(x[:, :, None], c[0, :, :4], s[0, :, :4], False), [Q, Q, Q]),
    "sdpa": (lambda q, k, v: sdpa(q, k, v), HEADS),
    "sdpa with a scale": (lambda q, k, v: sdpa(q, k, v, scale=0.3), HEADS),
    "sdpa with a mask": (lambda q, k, v: sdpa(q, k, v, attn_mask=MASK), HEADS),
    "sdpa with a bias": (lambda q, k, v: sdpa(q, k, v, attn_mask=MASK.float()), HEADS),
    "causal sdpa": (lambda q, k, v: sdpa(q, k, v, is_causal=True), [HEADS[0]] * 3),
}


@pytest.mark.parametrize("case", CASES)
def test_operators(case: str, tmp_path: Path) -> None:
    function, examples = CASES[case]
    assert_near(stage_of(function, *examples), tmp_path, FLOAT)


def test_symmetric_int8(tmp_path: Path) -> None:
    """Q/DQ pairs round as the operators do, at the last place of a float apart."""
    assert_near(symmetric_int8(block()), tmp_path, 1e-2)


def test_symmetric_int8_with_half_precision_scales(tmp_path: Path) -> None:
    stage = at_precision(symmetric_int8(block()), torch.float16)
    inputs = random(stage, 2)
    assert drift(run(stage, tmp_path, inputs), reference(stage)(inputs)[0]) < 2e-2


def in_blocks(bits: int, block: int) -> Stage:
    """One product with 5 outputs and 64 inputs."""
    generator = torch.Generator().manual_seed(bits)
    blocks = torch.randint(0, 256, (5, 64 // block, block * bits // 8), dtype=torch.uint8, generator=generator)
    scales = torch.rand(5, 64 // block, generator=generator)
    weights = [blocks, scales, None, torch.linspace(-1, 1, 5)]
    return one_call(BLOCKED_LINEAR, [floats(None, 3, 64)], weights, (bits, block, False))


@pytest.mark.parametrize(("bits", "element"), [(4, onnx.TensorProto.INT4), (8, onnx.TensorProto.INT8)])
@pytest.mark.parametrize("block", [16, 64])
def test_weights_in_blocks(bits: int, element: int, block: int, tmp_path: Path) -> None:
    stage = in_blocks(bits, block)
    inputs = random(stage, 2)
    assert drift(run(stage, tmp_path, inputs), reference(stage)(inputs)[0]) < FLOAT
    model = onnx.load(tmp_path / "stage.onnx")
    codes = next(weight for weight in model.graph.initializer if list(weight.dims) == [5, 64])
    assert codes.data_type == element and len(codes.raw_data) == 5 * 64 * bits // 8
    assert {entry.domain for entry in model.opset_import} == {""}
    assert not any(weight.data_type == onnx.TensorProto.UINT8 for weight in model.graph.initializer)
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    assert node.metadata_props, "the source line is kept"


def test_weights_in_blocks_in_half_precision(tmp_path: Path) -> None:
    stage = at_precision(in_blocks(4, 16), torch.float16)
    inputs = random(stage, 2)
    got, wanted = run(stage, tmp_path, inputs), reference(stage)(inputs)[0]
    assert drift(got, wanted) < 2e-3 and drift(got, reference(in_blocks(4, 16))(inputs)[0]) < 2e-3


def test_one_weight_of_two_layers(tmp_path: Path) -> None:
    stage = in_blocks(4, 16)
    graph = stage.graph.graph
    (node,) = graph.find_nodes(op="call_function", target=BLOCKED_LINEAR)
    with graph.inserting_after(node):
        again = graph.call_function(BLOCKED_LINEAR, node.args)
    with graph.inserting_after(again):
        total = graph.call_function(torch.ops.aten.add.Tensor, (node, again))
    graph.output_node().args = ((total,),)
    stage.graph.recompile()
    inputs = random(stage, 2)
    assert drift(run(stage, tmp_path, inputs), reference(stage)(inputs)[0]) < FLOAT
