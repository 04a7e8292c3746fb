"""Weights held in a smaller form and decoded where they are read; activations rounded to small floats.

The arithmetic stays in floats: what an engine makes of the pair of a decoder and a product is its own affair.
"""

from __future__ import annotations

import torch

from .blocked import unpack_bits
from .floats import E2M1, E4M3

NVFP4_BLOCK = 16


@torch.library.custom_op("stepfold::round_fp8", mutates_args=())
def round_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to the nearest `scale * E4M3` (QuantizeLinear and DequantizeLinear to FLOAT8E4M3FN).

    Args:
        x: [..., M] float32, or half precision.
        scale: [] of the type of `x`; values beyond 448 of it saturate.
    """
    return E4M3.nearest(x / scale) * scale


@round_fp8.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("stepfold::decode_fp8", mutates_args=())
def decode_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight [N, M] of codes, of the type of the scale.

    Args:
        codes: [N, M] float8_e4m3fn.
        scale: [N] float32, or half precision.
    """
    return codes.to(scale.dtype) * scale[:, None]


@decode_fp8.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("stepfold::round_nvfp4", mutates_args=())
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


@round_nvfp4.register_fake
def _(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("stepfold::decode_nvfp4", mutates_args=())
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


@decode_nvfp4.register_fake
def _(packed: torch.Tensor, block_scales: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.float32)


@torch.library.custom_op("stepfold::decode_codebook", mutates_args=())
def decode_codebook(indices: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight [N, M] float32 whose runs are named by their place in a codebook.

    Args:
        indices: [N, M / run] uint8.
        codebook: [codewords, run] float32.
        scale: [N] float32.
    """
    return codebook[indices.long()].flatten(1) * scale[:, None]


@decode_codebook.register_fake
def _(indices: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codebook.new_empty((indices.shape[0], indices.shape[1] * codebook.shape[1]))
