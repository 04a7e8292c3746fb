"""ONNX forms of weights that are decoded and of activations rounded to small floats.

`DECODED` runs anywhere and makes products in floats: ONNX Runtime turns pairs of QuantizeLinear and DequantizeLinear
around a product into integer products whatever their type, and cannot load the result for FP8. `PAIRS` replaces what
engines with FP8 products recognize.
"""

from __future__ import annotations

from typing import Any

import torch

from ...ir.decoded import NVFP4_BLOCK
from ...ir.floats import E2M1, E4M3

FP8 = torch.float8_e4m3fn
OPSET = 21
E2M1_VALUES = E2M1.decode(torch.arange(2**E2M1.bits), torch.float32)

E2M1_STEPS = ((0.25, 0.5), (0.75, 0.5), (1.25, 0.5), (1.75, 0.5), (2.5, 1.0), (3.5, 1.0), (5.0, 2.0))
"""Where a magnitude goes over to the next value of E2M1, and how far that is."""


def round_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Casts there and back."""
    return (x / scale).clamp(-E4M3.largest, E4M3.largest).to(FP8).to(torch.float32) * scale


def decode_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A cast, which engines fold when they load the stage."""
    return codes.to(torch.float32) * scale[:, None]


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


def round_nvfp4(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Written out in comparisons: the reference of engines that have no such operator."""
    groups = x.unflatten(-1, (-1, NVFP4_BLOCK))
    wanted = (groups.abs().amax(dim=-1, keepdim=True) / (E2M1.largest * unit)).clamp(max=E4M3.largest)
    scale = wanted.to(FP8).to(torch.float32) * unit
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    magnitude = (groups / scale).abs()
    rounded = torch.zeros_like(magnitude)
    for place, (edge, step) in enumerate(E2M1_STEPS):
        beyond = magnitude > edge if place % 2 == 0 else magnitude >= edge  # ties go to the even code
        rounded = rounded + torch.where(beyond, step, 0.0)
    return (rounded * torch.sign(groups) * scale).flatten(-2)


def decode_nvfp4(packed: torch.Tensor, block_scales: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Written out; engines fold it when they load the stage."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    scale = (block_scales.to(torch.float32) * unit).repeat_interleave(NVFP4_BLOCK, dim=1)
    return E2M1_VALUES[codes.long()] * scale


def decode_codebook(indices: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Gather; engines fold it when they load the stage, so that it is smaller on disk only."""
    return codebook[indices.long()].flatten(1) * scale[:, None]


DECODED: dict[Any, Any] = {
    torch.ops.stepfold.round_fp8.default: round_fp8,
    torch.ops.stepfold.decode_fp8.default: decode_fp8,
    torch.ops.stepfold.round_nvfp4.default: round_nvfp4,
    torch.ops.stepfold.decode_nvfp4.default: decode_nvfp4,
    torch.ops.stepfold.decode_codebook.default: decode_codebook,
}
"""For any engine."""

PAIRS: dict[Any, Any] = {
    torch.ops.stepfold.round_fp8.default: round_fp8_pair,
    torch.ops.stepfold.decode_fp8.default: decode_fp8_pair,
}
"""For engines that make FP8 products."""
