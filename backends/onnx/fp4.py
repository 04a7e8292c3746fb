"""NVFP4 in the form that TensorRT makes FP4 products of: E2M1 codes under E4M3 scales of blocks, twice dequantized.

The activations' codes and scales are taken at run time, by an operator that only TensorRT's parser knows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...ir.edit import add_buffer, copy_graph
from ...ir.operators.nvfp4 import NVFP4_BLOCK
from ...ir.program import Stage, attribute

FP4, FP8 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn  # two FP4 numbers are one element to PyTorch
E4M3 = 17  # onnx.TensorProto.FLOAT8E4M3FN
OPSET = 23
DECODE, ROUND = torch.ops.stepfold.decode_nvfp4.default, torch.ops.stepfold.round_nvfp4.default


def with_fp4_weights(stage: Stage) -> Stage:
    """The stage with the codes of NVFP4 weights in the type that ONNX has for them; it no longer runs in PyTorch."""
    graph = copy_graph(stage)
    for node in graph.graph.find_nodes(op="call_function", target=DECODE):
        packed = node.args[0]
        codes = attribute(graph, str(packed.target)).view(FP4)
        with graph.graph.inserting_before(node):
            held = graph.graph.get_attr(add_buffer(graph, f"{packed.target}_fp4", codes))
        node.args = (held, *node.args[1:])
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return replace(stage, graph=graph)


def decode(codes: torch.Tensor, block_scales: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The weight [N, M] of codes [N, M / 2]; see `stepfold::decode_nvfp4`."""
    return _dequantized(codes, block_scales, unit)


def round_activations(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Values as the nearest of their blocks; see `stepfold::round_nvfp4`."""
    *rows, M = x.shape
    codes, scales = torch.onnx.ops.symbolic_multi_out(
        "trt::TRT_FP4DynamicQuantize",
        (x, unit),
        {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": E4M3},
        dtypes=(FP4, FP8),
        shapes=((*rows, M // 2), (*rows, M // NVFP4_BLOCK)),
        version=1,
    )
    return _dequantized(codes, scales, unit)


def _dequantized(codes: torch.Tensor, block_scales: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    scales = _dequantize((block_scales, unit), block_scales.shape, {})
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    return _dequantize((codes, scales), shape, {"axis": -1, "block_size": NVFP4_BLOCK})


def _dequantize(inputs: tuple[torch.Tensor, ...], shape: Any, attributes: dict[str, int]) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", inputs, {**attributes}, dtype=torch.float32, shape=shape, version=OPSET
    )


LOWERINGS = {DECODE: decode, ROUND: round_activations}
