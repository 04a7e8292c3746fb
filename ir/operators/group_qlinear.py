"""A linear layer in integers whose activations are rounded at run time, by groups of a token's features."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from .record import Arguments, operator

LEVELS = 127


def _shape(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _flops(node: fx.Node) -> int:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return 2 * prod(node.meta["val"].shape) * weight.meta["val"].shape[0]


def _examples() -> list[Arguments]:
    weight = torch.randint(-60, 61, (32, 4), dtype=torch.int8)
    return [(torch.randn(2, 3, 32), weight, torch.rand(4) * 0.01, bias, 16) for bias in (torch.randn(4), None)]


@operator(shape=_shape, examples=_examples, portable=False, flops=_flops, weight=1)
def group_qlinear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    """`sum over groups g of s_g (round(x_g / s_g) weight_g) weight_scale + bias` with `s_g = max|x_g| / 127`.

    Args:
        x: [..., M] float32.
        weight: [M, N] int8.
        weight_scale: [N] float32.
        bias: [N] float32 or None.
        group: features that share a scale; the last group of a token may have fewer.

    Returns:
        [..., N] float32.
    """
    result = x.new_zeros((*x.shape[:-1], weight.shape[1]))
    for part, rows in zip(x.split(group, dim=-1), weight.split(group, dim=0), strict=True):
        scale = part.abs().amax(dim=-1, keepdim=True) / LEVELS
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        result = result + (torch.round(part / scale) @ rows.to(x.dtype)) * scale
    result = result * weight_scale
    return result if bias is None else result + bias
