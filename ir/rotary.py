"""Rotary position embedding: pairs of neighbouring features turned by an angle of their token."""

from __future__ import annotations

import torch


@torch.library.custom_op("stepfold::rotary", mutates_args=())
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


@rotary.register_fake
def _(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, heads_first: bool) -> torch.Tensor:
    return torch.empty_like(x)
