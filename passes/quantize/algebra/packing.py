"""Codes of a few bits in bytes, and the layout that ONNX Runtime's `MatMulNBits` reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....loop.errors import UsageError
from .grids import IntegerGrid, Quantized, Scales

BLOCK_BITS = (2, 4, 8)
SMALLEST_BLOCK = 16


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., n] below 2**bits as uint8 [..., ceil(n bits / 8)]: one stream of bits, lowest first.

    With 4 bits the first code of a byte is its low nibble. The last byte is filled up with zeros.

    Raises:
        UsageError: bits are not 1 to 8, or a code needs more.
    """
    _expect_bits(bits)
    if codes.numel() and not 0 <= int(codes.amin()) <= int(codes.amax()) < 2**bits:
        received = f"{int(codes.amin())} to {int(codes.amax())}"
        raise UsageError(
            f"codes: expected 0 to {2**bits - 1} for {bits} bits; received {received}. Pack with more bits."
        )
    stream = _stream(codes.to(torch.uint8), bits)
    whole = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (whole << torch.arange(8, dtype=torch.uint8)).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The codes [..., count] uint8 that `pack_bits` packed."""
    _expect_bits(bits)
    stream = _stream(packed, 8)[..., : count * bits].unflatten(-1, (count, bits))
    return (stream << torch.arange(bits, dtype=torch.uint8)).sum(dim=-1, dtype=torch.uint8)


def _stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The bits of codes [..., n], lowest first: uint8 [..., n bits]."""
    return ((codes[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1).flatten(-2)


def _expect_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise UsageError(f"bits: expected 1 to 8; received {bits}.")


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


def pack_blocks(codes: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Unsigned codes [N, M] as B [N, ceil(M / block), block * bits / 8] uint8; the last block is filled with zeros."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % block))
    return pack_bits(padded.unflatten(1, (-1, block)), bits)


def unpack_blocks(blocks: torch.Tensor, bits: int, block: int, in_features: int) -> torch.Tensor:
    """The codes [N, M] uint8 that `pack_blocks` packed."""
    return unpack_bits(blocks, bits, block).flatten(1)[:, :in_features]


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


def from_matmul_nbits(packed: BlockedWeight) -> Quantized:
    """The codes and scales that `to_matmul_nbits` laid out."""
    grid = IntegerGrid(packed.bits, packed.block, symmetric=packed.zero_points is None)
    codes = unpack_blocks(packed.blocks, packed.bits, packed.block, packed.in_features)
    if packed.zero_points is None:
        signed = (codes.to(torch.int16) - 2 ** (packed.bits - 1)).to(torch.int8)
        return Quantized(grid, signed, Scales(packed.scales, packed.block))
    zero = unpack_bits(packed.zero_points, packed.bits, packed.scales.shape[1])
    return Quantized(grid, codes, Scales(packed.scales, packed.block, zero))
