"""A linear layer whose product is in integers."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from .record import Arguments, operator

UNSIGNED_ZERO = 128
"""The code of zero in unsigned weights."""


def _shape(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], weight.shape[1]), dtype=torch.float32)


def _flops(node: fx.Node) -> int:
    weight = node.args[3]
    assert isinstance(weight, fx.Node)
    return 2 * prod(node.meta["val"].shape) * weight.meta["val"].shape[0]


def _examples() -> list[Arguments]:
    q = torch.randint(0, 256, (2, 3, 8), dtype=torch.uint8)
    weight = torch.randint(-60, 61, (8, 4), dtype=torch.int8)
    scales = torch.tensor(0.02), torch.tensor(120, dtype=torch.uint8), weight, torch.rand(4) * 0.01
    return [(q, *scales, torch.randn(4)), (q, *scales, None)]


@operator(shape=_shape, examples=_examples, portable=False, flops=_flops, weight=3)
def qlinear(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`scale (q - zero) (weight weight_scale) + bias` with the product in integers, exact for all codes.

    Args:
        q: [..., M] uint8 or int8 activations.
        scale: [] float32, or half precision.
        zero: [] of the type of `q`.
        weight: [M, N] int8, the form that integer GEMMs are fast on; or uint8 with zero at `UNSIGNED_ZERO`.
        weight_scale: [N] of the type of `scale`, one per output channel.
        bias: [N] of that type, or None.

    Returns:
        [..., N] float32.
    """
    codes = weight.to(torch.float32) - (UNSIGNED_ZERO if weight.dtype is torch.uint8 else 0)
    product = (q.to(torch.float32) - zero.to(torch.float32)) @ codes
    result = product * (scale.to(torch.float32) * weight_scale.to(torch.float32))
    return result if bias is None else result + bias
