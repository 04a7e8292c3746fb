"""Symmetric int8 weights, one scale for each output channel."""

from __future__ import annotations

import torch

LEVELS = 127


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to signed int8 per output channel.

    Args:
        weight: [N, M] float32.

    Returns:
        q [M, N] int8 (the layout integer GEMMs read) and scale [N] float32 with `weight ~ (q scale).T`.
    """
    scale = weight.abs().amax(dim=1) / LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    q = torch.round(weight / scale[:, None]).clamp(-LEVELS, LEVELS).to(torch.int8)
    return q.T.contiguous(), scale


def activation_range(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [] float32 and zero point [] uint8 that cover [low, high] and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    if scale < torch.finfo(torch.float32).tiny:  # nothing to tell apart: zero is all there is
        scale = 1.0
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(round(-low / scale), dtype=torch.uint8)


def positive(scale: torch.Tensor) -> torch.Tensor:
    """A scale of any shape as float32; 1 where there is nothing but zeros."""
    return torch.where(scale > 0, scale, torch.ones_like(scale)).to(torch.float32)


ONE_SIDED = 0.25
"""The smaller end of a range over the larger, in magnitude, up to which half of the symmetric codes are wasted."""


def centring_offset(low: float, high: float) -> float | None:
    """c for which x - c uses all of symmetric int8 (F7 of the method cards), None for a range that is not one-sided.

    c is a whole number k of the steps of x - c: zero, where activation functions put most of their values, stays a
    level exactly. With [low, high] in [c - 127 s, c + 127 s] and c = k s, the largest k whose step reaches both ends is
    `floor(127 (high + low) / (high - low))` with `s = high / (127 + k)`.

    Args:
        low: smallest value.
        high: largest value.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if -low > high:
        mirrored = centring_offset(-high, -low)
        return None if mirrored is None else -mirrored
    if high == 0 or -low > ONE_SIDED * high:
        return None
    steps = int(LEVELS * (high + low) / (high - low))
    return steps * high / (LEVELS + steps)
