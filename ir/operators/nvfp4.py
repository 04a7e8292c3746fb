"""Weights and activations of 4 bits in floating point, under scales of 16 channels (NVFP4)."""

from __future__ import annotations

import torch

from ..blocked import unpack_bits
from ..floats import E2M1, E4M3
from .record import Arguments, operator

FP8 = torch.float8_e4m3fn
NVFP4_BLOCK = 16
E2M1_VALUES = E2M1.decode(torch.arange(2**E2M1.bits), torch.float32)

E2M1_STEPS = ((0.25, 0.5), (0.75, 0.5), (1.25, 0.5), (1.75, 0.5), (2.5, 1.0), (3.5, 1.0), (5.0, 2.0))
"""Where a magnitude goes over to the next value of E2M1, and how far that is."""


def _rounded_shape(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _rounded(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Written out in comparisons: the reference of engines that have no such operator."""
    groups = x.unflatten(-1, (-1, NVFP4_BLOCK))
    wanted = (groups.abs().amax(dim=-1, keepdim=True) / (E2M1.largest * unit)).clamp(max=E4M3.largest)
    scale = wanted.to(FP8).to(torch.float32) * unit
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    magnitude = (groups / scale).abs()
    rounded = torch.zeros_like(magnitude)
    for place, (edge, step) in enumerate(E2M1_STEPS):
        beyond = magnitude > edge if place % 2 == 0 else magnitude >= edge  # ties go to the even code
        rounded = rounded + torch.where(beyond, step, 0.0)
    return (rounded * torch.sign(groups) * scale).flatten(-2)


def _rounded_examples() -> list[Arguments]:
    return [(torch.randn(2, 3, 32), torch.tensor(1e-3))]


@operator(shape=_rounded_shape, examples=_rounded_examples, portable=_rounded)
def round_nvfp4(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Round to E2M1 under E4M3 scales of 16 channels, taken at run time (NVFP4 activations).

    Args:
        x: [..., M] float32, M a multiple of 16.
        unit: [] float32 that the scales are multiples of: the largest magnitude expected over 6 * 448.
    """
    groups = x.unflatten(-1, (-1, NVFP4_BLOCK))
    scale = E4M3.nearest(groups.abs().amax(dim=-1, keepdim=True) / (E2M1.largest * unit)) * unit
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (E2M1.nearest(groups / scale) * scale).flatten(-2)


def _decoded_shape(packed: torch.Tensor, block_scales: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.float32)


def _decoded(packed: torch.Tensor, block_scales: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Written out; engines fold it when they load the stage."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    scale = (block_scales.to(torch.float32) * unit).repeat_interleave(NVFP4_BLOCK, dim=1)
    return E2M1_VALUES[codes.long()] * scale


def _decoded_examples() -> list[Arguments]:
    packed = torch.randint(0, 256, (4, 16), dtype=torch.uint8)
    return [(packed, torch.rand(4, 2).to(FP8), torch.tensor(0.1))]


@operator(shape=_decoded_shape, examples=_decoded_examples, portable=_decoded, weight=0)
def decode_nvfp4(packed: torch.Tensor, block_scales: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The weight [N, M] float32 of E2M1 codes.

    Args:
        packed: [N, M / 2] uint8, two codes a byte, the first in the low nibble.
        block_scales: [N, M / 16] float8_e4m3fn.
        unit: [] float32 that the scales are multiples of.
    """
    codes = unpack_bits(packed, E2M1.bits, 2 * packed.shape[1])
    scale = (block_scales.to(torch.float32) * unit).repeat_interleave(NVFP4_BLOCK, dim=1)
    return E2M1.decode(codes, torch.float32) * scale
