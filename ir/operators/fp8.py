"""Weights and activations of 8 bits in floating point (E4M3)."""

from __future__ import annotations

import torch

from ..floats import E4M3
from .record import Arguments, operator

FP8 = torch.float8_e4m3fn


def _rounded_shape(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Casts there and back."""
    return (x / scale).clamp(-E4M3.largest, E4M3.largest).to(FP8).to(torch.float32) * scale


def _rounded_examples() -> list[Arguments]:
    return [(torch.randn(2, 3, 8), torch.tensor(0.01)), (1e4 * torch.randn(2, 3, 8), torch.tensor(0.5))]


@operator(shape=_rounded_shape, examples=_rounded_examples, portable=_rounded)
def round_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to the nearest `scale * E4M3` (QuantizeLinear and DequantizeLinear to FLOAT8E4M3FN).

    Args:
        x: [..., M] float32, or half precision.
        scale: [] of the type of `x`; values beyond 448 of it saturate.
    """
    return E4M3.nearest(x / scale) * scale


def _decoded_shape(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def _decoded(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A cast, which engines fold when they load the stage."""
    return codes.to(torch.float32) * scale[:, None]


def _decoded_examples() -> list[Arguments]:
    return [(torch.randn(4, 8).to(FP8), torch.rand(4))]


@operator(shape=_decoded_shape, examples=_decoded_examples, portable=_decoded, weight=0)
def decode_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight [N, M] of codes, of the type of the scale.

    Args:
        codes: [N, M] float8_e4m3fn.
        scale: [N] float32, or half precision.
    """
    return codes.to(scale.dtype) * scale[:, None]
