"""Activations in 8 bits under a scale that was known before."""

from __future__ import annotations

import torch

from .record import Arguments, operator


def _shape(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=zero.dtype)


def _examples() -> list[Arguments]:
    x = torch.randn(2, 3, 8)
    return [
        (x, torch.tensor(0.02), torch.tensor(120, dtype=torch.uint8)),
        (x, torch.tensor(0.02), torch.tensor(0, dtype=torch.int8)),
    ]


@operator(shape=_shape, examples=_examples, portable=False)
def quantize_static(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Quantize with a scale and zero point known before (ONNX `QuantizeLinear`).

    Args:
        x: [..., M] float32, or half precision.
        scale: [] of the type of `x`.
        zero: [] uint8, or int8 zero for symmetric activations.

    Returns:
        q [..., M] of the type of `zero`; values outside its range saturate.
    """
    limits = torch.iinfo(zero.dtype)
    return (torch.round(x / scale) + zero.to(x.dtype)).clamp(limits.min, limits.max).to(zero.dtype)
