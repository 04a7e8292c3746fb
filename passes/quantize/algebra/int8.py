"""Ranges of 8-bit activations, and the layout of weights for products in integers."""

from __future__ import annotations

import torch

from .grids import Quantized

LEVELS = 127


def to_products(quantized: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, N] int8, the layout that products in integers read, and scale [N] float32 of a weight [N, M]."""
    return quantized.codes.T.contiguous(), quantized.scales.scale[:, 0].to(torch.float32)


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
