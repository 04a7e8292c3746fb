"""Weights of 2, 4 or 8 bits in blocks, as ONNX Runtime's `MatMulNBits` lays them out, and the layer that reads them."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from ..loop.errors import UsageError
from .cost import FORMULAS

ACTIVATION_LEVELS = 127


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
    """The weight [N, M] float32 that blocks stand for; see `blocked_linear`."""
    codes = unpack_blocks(blocks, bits, block, M).to(torch.float32)
    scales = scales.to(torch.float32)
    zero = torch.full_like(scales, 2.0 ** (bits - 1))
    if zero_points is not None:
        zero = unpack_bits(zero_points, bits, scales.shape[1]).to(torch.float32)
    scale, zero = (part.repeat_interleave(block, dim=1)[:, :M] for part in (scales, zero))
    return (codes - zero) * scale


@torch.library.custom_op("stepfold::blocked_linear", mutates_args=())
def blocked_linear(
    x: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    block: int,
    round_activations: bool,
) -> torch.Tensor:
    """`x W^T + bias` with W in blocks of a few bits (contrib `MatMulNBits`).

    Args:
        x: [..., M] float32, or half precision.
        blocks: [N, ceil(M / block), block * bits / 8] uint8, see `pack_blocks`.
        scales: [N, ceil(M / block)] of the type of x.
        zero_points: [N, ceil(ceil(M / block) * bits / 8)] uint8; None where all are 2**(bits - 1).
        bias: [N] of the type of x, or None.
        bits: 2, 4 or 8.
        block: input channels that share a scale.
        round_activations: whether x is rounded to 8 bits, symmetric in each row and block, so that the products are
            of integers (accuracy level 4). Rows do not share a scale, so samples of a batch stay independent.

    Returns:
        [..., N] of the type of x.
    """
    weight = decoded(blocks, scales, zero_points, bits, block, x.shape[-1]).to(x.dtype)
    result = (_rounded(x, block) if round_activations else x) @ weight.T
    return result if bias is None else result + bias


@blocked_linear.register_fake
def _(
    x: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    block: int,
    round_activations: bool,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], blocks.shape[0]))


def _flops(node: fx.Node) -> int:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return 2 * prod(node.meta["val"].shape) * x.meta["val"].shape[-1]


FORMULAS[torch.ops.stepfold.blocked_linear.default] = _flops


def _rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    """x [..., M] as 8-bit integers under one scale for each row and block."""
    M = x.shape[-1]
    groups = torch.nn.functional.pad(x.to(torch.float32), (0, -M % block)).unflatten(-1, (-1, block))
    scale = groups.abs().amax(dim=-1, keepdim=True) / ACTIVATION_LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (torch.round(groups / scale) * scale).flatten(-2)[..., :M].to(x.dtype)


def _stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The bits of codes [..., n], lowest first: uint8 [..., n bits]."""
    return ((codes[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1).flatten(-2)


def _expect_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise UsageError(f"bits: expected 1 to 8; received {bits}.")
