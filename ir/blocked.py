"""Weights of 2, 4 or 8 bits in blocks, as ONNX Runtime's `MatMulNBits` lays them out."""

from __future__ import annotations

import torch

from ..loop.errors import UsageError


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


def pack_blocks(codes: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Unsigned codes [N, M] as [N, ceil(M / block), block * bits / 8] uint8; the last block is filled with zeros."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % block))
    return pack_bits(padded.unflatten(1, (-1, block)), bits)


def unpack_blocks(blocks: torch.Tensor, bits: int, block: int, in_features: int) -> torch.Tensor:
    """The codes [N, M] uint8 that `pack_blocks` packed."""
    return unpack_bits(blocks, bits, block).flatten(1)[:, :in_features]


def decoded(
    blocks: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, bits: int, block: int, M: int
) -> torch.Tensor:
    """The weight [N, M] float32 that blocks stand for; see `stepfold::blocked_linear`."""
    codes = unpack_blocks(blocks, bits, block, M).to(torch.float32)
    scales = scales.to(torch.float32)
    zero = torch.full_like(scales, 2.0 ** (bits - 1))
    if zero_points is not None:
        zero = unpack_bits(zero_points, bits, scales.shape[1]).to(torch.float32)
    scale, zero = (part.repeat_interleave(block, dim=1)[:, :M] for part in (scales, zero))
    return (codes - zero) * scale


def _stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The bits of codes [..., n], lowest first: uint8 [..., n bits]."""
    return ((codes[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1).flatten(-2)


def _expect_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise UsageError(f"bits: expected 1 to 8; received {bits}.")
