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
