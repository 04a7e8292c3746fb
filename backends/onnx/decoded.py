"""ONNX forms of weights of 8 bits in floating point, and of activations rounded to them.

The portable forms of these operators make products in floats: ONNX Runtime turns pairs of QuantizeLinear and
DequantizeLinear around a product into integer products whatever their type, and cannot load the result for FP8. `PAIRS`
are what engines with FP8 products recognize.
"""

from __future__ import annotations

from typing import Any

import torch

FP8 = torch.float8_e4m3fn
OPSET = 21


def round_fp8_pair(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """QuantizeLinear and DequantizeLinear, for engines that make FP8 products of such pairs."""
    zero = torch.zeros((), dtype=FP8)
    codes = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=FP8, shape=x.shape, version=OPSET)
    return _dequantized(codes, scale, zero, {})


def decode_fp8_pair(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """DequantizeLinear over the output channels."""
    return _dequantized(codes, scale, torch.zeros(codes.shape[0], dtype=FP8), {"axis": 0})


def _dequantized(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, attributes: dict[str, Any]
) -> torch.Tensor:
    inputs, dtype, shape = (codes, scale, zero), scale.dtype, codes.shape
    return torch.onnx.ops.symbolic("DequantizeLinear", inputs, attributes, dtype=dtype, shape=shape, version=OPSET)


PAIRS: dict[Any, Any] = {
    torch.ops.stepfold.round_fp8.default: round_fp8_pair,
    torch.ops.stepfold.decode_fp8.default: decode_fp8_pair,
}
"""For engines that make FP8 products."""
