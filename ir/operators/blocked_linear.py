"""A linear layer whose weights are blocks of a few bits."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from ..blocked import decoded, pack_blocks
from .record import Arguments, operator

ACTIVATION_LEVELS = 127


def _shape(x: torch.Tensor, blocks: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], blocks.shape[0]))


def _flops(node: fx.Node) -> int:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return 2 * prod(node.meta["val"].shape) * x.meta["val"].shape[-1]


def _examples() -> list[Arguments]:
    x, bits, block = torch.randn(2, 3, 64), 4, 32
    blocks = pack_blocks(torch.randint(0, 2**bits, (16, 64)), bits, block)
    scales = torch.rand(16, 2) * 0.1
    return [(x, blocks, scales, None, torch.randn(16), bits, block, rounds) for rounds in (False, True)]


@operator(shape=_shape, examples=_examples, portable=False, flops=_flops, weight=1)
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


def _rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    """x [..., M] as 8-bit integers under one scale for each row and block."""
    M = x.shape[-1]
    groups = torch.nn.functional.pad(x.to(torch.float32), (0, -M % block)).unflatten(-1, (-1, block))
    scale = groups.abs().amax(dim=-1, keepdim=True) / ACTIVATION_LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (torch.round(groups / scale) * scale).flatten(-2)[..., :M].to(x.dtype)
