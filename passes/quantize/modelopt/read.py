"""Read the decisions of a Q/DQ model: codes and scales of every linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

from ....loop.errors import StepfoldError

Array = np.ndarray
PRODUCTS = ("MatMul", "Gemm")
INTEGERS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}
FLOAT8 = "float8_e4m3fn"
FLOAT8_LARGEST = 448.0  # e4m3fn has no infinity: what is larger saturates
DTYPES: dict[int, str] = {
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.UINT4: "uint4",
    onnx.TensorProto.FLOAT8E4M3FN: FLOAT8,
}


@dataclass(frozen=True)
class QuantizedInput:
    """How a layer's input is quantized: `x ~ scale (q - zero)` with one scale for the tensor.

    Attributes:
        scale: positive.
        zero: the code of zero; 0 for `float8_e4m3fn`.
        dtype: type of the codes.
    """

    scale: float
    zero: int
    dtype: str


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes: `weight ~ scale (codes - zero)`.

    Attributes:
        codes: [M, N]; four bits are kept in int8 or uint8, `float8_e4m3fn` as that type.
        scale: float32 [N], one for each output channel, or [M / group, N].
        zero: zero points, int32, in the shape of `scale`.
        dtype: type of the codes, as the model declares them.
        group: input channels that share a scale; None where all of them do.
    """

    codes: Array
    scale: Array
    zero: Array
    dtype: str
    group: int | None = None

    def dequantized(self) -> Array:
        """The weight that the codes stand for, float32 [M, N]."""
        scale, zero = self.by_row()
        return (self.codes.astype(np.float32) - zero.astype(np.float32)) * scale

    def by_row(self) -> tuple[Array, Array]:
        """Scale and zero in a shape that broadcasts to [M, N]."""
        if self.group is None:
            return self.scale, self.zero
        rows = len(self.codes)
        return np.repeat(self.scale, self.group, axis=0)[:rows], np.repeat(self.zero, self.group, axis=0)[:rows]


@dataclass(frozen=True)
class LinearDecision:
    """What a quantizer decided for one linear layer.

    Attributes:
        input: None where activations stay as they are.
        weight: weight of the layer.
        multiplier: [M] factors of the input before the product (AWQ), already divided out of the weight; or None.
    """

    input: QuantizedInput | None
    weight: QuantizedWeight
    multiplier: Array | None = None


def read_decisions(path: Path) -> dict[str, LinearDecision]:
    """The linear layers of a Q/DQ model whose weight is quantized.

    Args:
        path: an ONNX file.

    Returns:
        Decisions by the name of the product's node. Products of two activations and layers that were left in floating
        point are not among them.

    Raises:
        StepfoldError: the file is not ONNX, or quantizes a layer in a form that is not understood.
    """
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf, onnx and the file system each have their own
        raise StepfoldError(f"{path}: expected an ONNX model; received: {error}") from error
    graph = _Graph(model.graph, path)
    found = {node.name: graph.decision(node) for node in model.graph.node if node.op_type in PRODUCTS}
    return {name: decision for name, decision in found.items() if decision is not None}


class _Graph:
    """Who makes each value, and the values that are stored."""

    def __init__(self, graph: onnx.GraphProto, path: Path):
        self._path = path
        self._makers = {output: node for node in graph.node for output in node.output}
        self._stored = {item.name: item for item in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].HasField("t"):
                self._stored[node.output[0]] = node.attribute[0].t

    def decision(self, product: onnx.NodeProto) -> LinearDecision | None:
        """What was decided for one product; None when its weight is not quantized."""
        weight = self._weight(product)
        if weight is None:
            return None
        return LinearDecision(self._input(product), weight, self._multiplier(product, len(weight.codes)))

    def _weight(self, product: onnx.NodeProto) -> QuantizedWeight | None:
        dequantize = self._maker(product.input[1], "DequantizeLinear")
        if dequantize is None:
            return None
        stored, quantize = dequantize.input[0], self._maker(dequantize.input[0], "QuantizeLinear")
        values = self._array(quantize.input[0] if quantize is not None else stored)
        if values is None:
            return None  # a product of two activations
        if values.ndim != 2:
            raise self._unknown(product, f"a weight of rank {values.ndim}", "2")
        scale, zero, dtype = self._parameters(dequantize, quantize)
        attributes = _attributes(dequantize)
        transposed = bool(_attributes(product).get("transB", 0))
        axis, group = int(attributes.get("axis", 1)) % 2, int(attributes.get("block_size", 0)) or None
        if transposed:
            values, axis = values.T, 1 - axis
            scale, zero = scale.T, zero.T
        if scale.ndim and axis != (1 if group is None else 0):
            raise self._unknown(product, f"scales along axis {axis} of the weight [M, N]", "one for an output channel")
        if group is None:
            scale, zero = (np.array(np.broadcast_to(part, values.shape[1:])) for part in (scale, zero))
        weight = QuantizedWeight(values, scale, zero, dtype, group)
        return weight if quantize is None else _encoded(weight)

    def _input(self, product: onnx.NodeProto) -> QuantizedInput | None:
        dequantize = self._maker(product.input[0], "DequantizeLinear")
        if dequantize is None:
            return None
        scale, zero, dtype = self._parameters(dequantize, self._maker(dequantize.input[0], "QuantizeLinear"))
        if scale.size != 1:
            raise self._unknown(product, f"an input with {scale.size} scales", "one scale for the tensor")
        return QuantizedInput(float(scale.item()), int(zero.item()), dtype)

    def _multiplier(self, product: onnx.NodeProto, width: int) -> Array | None:
        """Factors of each input channel that AWQ puts in front of a product; any other Mul is the model's own."""
        multiply = self._maker(product.input[0], "Mul")
        if multiply is None or not multiply.input[1].endswith("_pre_quant_scale"):
            return None
        factors = self._array(multiply.input[1])
        if factors is None or factors.size != width:
            raise self._unknown(product, "factors of the input that are not stored", f"{width} of them")
        return factors.reshape(-1).astype(np.float32)

    def _parameters(self, dequantize: onnx.NodeProto, quantize: onnx.NodeProto | None) -> tuple[Array, Array, str]:
        """Scale, zero point and the dtype of the codes."""
        scale = self._array(dequantize.input[1])
        if scale is None:
            raise self._unknown(dequantize, "a scale that is computed", "a stored one")
        dtype = self._dtype(dequantize, quantize)
        zero = self._array(dequantize.input[2]) if len(dequantize.input) > 2 and dequantize.input[2] else None
        whole = np.zeros(scale.shape, np.int32) if zero is None else zero.astype(np.float32).astype(np.int32)
        return scale.astype(np.float32), whole, dtype

    def _dtype(self, dequantize: onnx.NodeProto, quantize: onnx.NodeProto | None) -> str:
        zero = self._stored.get(dequantize.input[2]) if len(dequantize.input) > 2 else None
        tensor = zero if zero is not None else self._stored.get(dequantize.input[0])
        declared = _attributes(quantize).get("output_dtype") if quantize is not None else None
        kind = tensor.data_type if tensor is not None else declared or onnx.TensorProto.UINT8
        if kind not in DTYPES:
            name = onnx.TensorProto.DataType.Name(kind)  # type: ignore[arg-type]
            raise self._unknown(dequantize, f"codes of type {name}", ", ".join(sorted(DTYPES.values())))
        return DTYPES[kind]

    def _maker(self, value: str, operator: str) -> onnx.NodeProto | None:
        node = self._makers.get(value)
        return node if node is not None and node.op_type == operator else None

    def _array(self, value: str) -> Array | None:
        tensor = self._stored.get(value)
        if tensor is None:
            return None
        values = numpy_helper.to_array(tensor, base_dir=str(self._path.parent))
        four_bits = {np.dtype(ml_dtypes.int4): np.int8, np.dtype(ml_dtypes.uint4): np.uint8}
        return values.astype(four_bits.get(values.dtype, values.dtype))

    def _unknown(self, node: onnx.NodeProto, received: str, expected: str) -> StepfoldError:
        return StepfoldError(
            f"{self._path.name}: {node.op_type} {node.name}: expected {expected}; received {received}. "
            "Exclude this layer from the quantization."
        )


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def _encoded(weight: QuantizedWeight) -> QuantizedWeight:
    """A float weight that the model quantizes when it is loaded, as the codes that come of it."""
    scale, zero = weight.by_row()
    scaled = weight.codes.astype(np.float32) / scale
    if weight.dtype == FLOAT8:
        codes = np.clip(scaled, -FLOAT8_LARGEST, FLOAT8_LARGEST).astype(ml_dtypes.float8_e4m3fn)
    else:
        low, high = INTEGERS[weight.dtype]
        kind = np.uint8 if low == 0 else np.int8
        codes = np.clip(np.rint(scaled) + zero, low, high).astype(kind)
    return QuantizedWeight(codes, weight.scale, weight.zero, weight.dtype, weight.group)
