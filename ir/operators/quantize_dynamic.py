"""Activations in 8 bits under a scale that is taken at run time."""

from __future__ import annotations

import torch

from .record import Arguments, operator

UINT8_STEPS = 255


def _shape(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(()), x.new_empty((), dtype=torch.uint8)


def _examples() -> list[Arguments]:
    return [(torch.randn(2, 3, 8),), (torch.zeros(2, 4),)]


@operator(shape=_shape, examples=_examples, portable=False, couples_batch=True)
def quantize_dynamic(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a whole tensor to uint8 by its own range (ONNX `DynamicQuantizeLinear`).

    Args:
        x: [..., M] float32.

    Returns:
        q [..., M] uint8, scale [] float32, zero point [] uint8 with `x ~ scale (q - zero)`.
    """
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / UINT8_STEPS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(-low / scale).clamp(0, UINT8_STEPS)
    q = (torch.round(x / scale) + zero).clamp(0, UINT8_STEPS).to(torch.uint8)
    return q, scale, zero.to(torch.uint8)
