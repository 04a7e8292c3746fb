"""Rounded weights in the layout that ONNX Runtime's `MatMulNBits` reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....ir.blocked import pack_bits, pack_blocks
from ....loop.errors import UsageError
from .grids import IntegerGrid, Quantized

BLOCK_BITS = (2, 4, 8)
SMALLEST_BLOCK = 16


@dataclass(frozen=True, eq=False)
class BlockedWeight:
    """The inputs of `com.microsoft.MatMulNBits` for `y = x W^T`, and its attributes.

    Attributes:
        blocks: B [N, ceil(M / block), block * bits / 8] uint8.
        scales: [N, ceil(M / block)] float32.
        zero_points: [N, ceil(ceil(M / block) * bits / 8)] uint8; None where all are 2**(bits - 1), the default.
        bits: 2, 4 or 8.
        block: input channels that share a scale.
        in_features: M.
    """

    blocks: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    bits: int
    block: int
    in_features: int


def to_matmul_nbits(quantized: Quantized) -> BlockedWeight:
    """Lay out integer codes as `MatMulNBits` reads them.

    Raises:
        UsageError: the grid is not of integers of 2, 4 or 8 bits in groups of a power of two from 16.
    """
    grid, scales = quantized.grid, quantized.scales
    if not isinstance(grid, IntegerGrid) or grid.bits not in BLOCK_BITS:
        expected = "integers of 2, 4 or 8 bits"
        raise UsageError(f"MatMulNBits: expected {expected}; received {grid}. Quantize to another grid.")
    block = scales.group
    if isinstance(grid.group, str) or block < SMALLEST_BLOCK or block & (block - 1):
        received = f"{grid.group!r}" if isinstance(grid.group, str) else str(block)
        raise UsageError(
            f"MatMulNBits: group: expected a power of two from {SMALLEST_BLOCK}; received {received}. Try 32, 64 or 128."
        )
    codes = quantized.codes if scales.zero is not None else quantized.codes.to(torch.int16) + 2 ** (grid.bits - 1)
    zero_points = None if scales.zero is None else pack_bits(scales.zero, grid.bits)
    blocks = pack_blocks(codes.to(torch.uint8), grid.bits, block)
    return BlockedWeight(blocks, scales.scale.to(torch.float32), zero_points, grid.bits, block, codes.shape[1])
