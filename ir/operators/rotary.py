"""Rotary position embedding: pairs of neighbouring features turned by an angle of their token."""

from __future__ import annotations

import torch

from .record import Arguments, operator


def _shape(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, heads_first: bool) -> torch.Tensor:
    return torch.empty_like(x)


def _examples() -> list[Arguments]:
    angles = torch.arange(5.0)[:, None] * torch.tensor([0.1, 1.0, 2.0])
    tables = angles.cos(), angles.sin()
    return [(torch.randn(2, 5, 3, 6), *tables, False), (torch.randn(2, 3, 5, 6), *tables, True)]


@operator(shape=_shape, examples=_examples)
def rotary(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, heads_first: bool) -> torch.Tensor:
    """Turn features 2i and 2i + 1 of every head by the angle i of the token (RoFormer, arXiv 2104.09864, section 3.4).

    Args:
        x: [B, T, H, K], or [B, H, T, K] where `heads_first`.
        cosine: [T, K / 2].
        sine: [T, K / 2].
        heads_first: which of the two layouts `x` has.

    Returns:
        Of the shape of `x`.
    """
    if not heads_first:
        cosine, sine = cosine[:, None], sine[:, None]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)
