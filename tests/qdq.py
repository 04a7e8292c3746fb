"""Q/DQ models written by hand, as quantizers write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray


@dataclass
class Builder:
    """Nodes and stored tensors of a model that reads `x` [B, 3, M]."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: list[onnx.TensorProto] = field(default_factory=list)

    def store(self, name: str, value: Array | onnx.TensorProto) -> str:
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        self.stored.append(tensor)
        return name

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node whose output has its name."""
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def pair(self, value: str, scale: Array, zero: Array | onnx.TensorProto, **attributes: Any) -> str:
        """QuantizeLinear and DequantizeLinear."""
        parameters = [self.store(f"{value}_scale", scale), self.store(f"{value}_zero", _named(zero, f"{value}_zero"))]
        codes = self.node("QuantizeLinear", [value, *parameters], f"{value}_q", **attributes)
        return self.node("DequantizeLinear", [codes, *parameters], f"{value}_dq", **attributes)

    def save(self, path: Path, outputs: Sequence[str], width: int = 4) -> Path:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3, width])
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "qdq", [x], results, self.stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.save(model, str(path))
        return path


def _named(value: Array | onnx.TensorProto, name: str) -> Array | onnx.TensorProto:
    if isinstance(value, onnx.TensorProto):
        value.name = name
    return value


def four_bits(codes: Array, name: str) -> onnx.TensorProto:
    """Codes of -8 to 7 as an INT4 tensor."""
    return helper.make_tensor(name, TensorProto.INT4, codes.shape, codes.flatten().tolist())


def per_channel(weight: Array) -> Array:
    """Scales [N] of symmetric int8 for a weight [M, N]."""
    return (np.abs(weight).max(axis=0) / 127).astype(np.float32)
