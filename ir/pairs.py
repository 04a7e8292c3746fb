"""Pairs of neighbouring 8-bit weights, which processors without VNNI add up in 16 bits.

There u8 x s8 is multiplied with `vpmaddubsw`: the products of input channels 2j and 2j + 1 are added in 16 bits that
saturate, before anything is accumulated in 32. Every sum is right for every activation when the positive and the
negative weights of each pair add up to no more than 128 in magnitude, because 255 * 128 = 32640 fits and 255 * 129
does not. With VNNI (`vpdpbusd`) all codes are right.
"""

from __future__ import annotations

import torch

LARGEST_SUM = 128
"""What the weights of one sign may add up to within a pair."""


def pair_sums(weight: torch.Tensor) -> torch.Tensor:
    """What the weights of one sign add up to in each pair of neighbours, the larger of both signs in magnitude.

    Args:
        weight: [N, M] codes or numbers; a last channel without a neighbour stands alone.

    Returns:
        [N, ceil(M / 2)] of the type of the weight, int32 for codes.
    """
    values = weight if weight.is_floating_point() else weight.to(torch.int32)
    pairs = torch.nn.functional.pad(values, (0, values.shape[1] % 2)).unflatten(1, (-1, 2))
    return torch.maximum(pairs.clamp(min=0).sum(dim=-1), -pairs.clamp(max=0).sum(dim=-1))


def saturates(codes: torch.Tensor) -> bool:
    """Whether codes [N, M] int8 have a pair that adds up to more than 16 bits hold."""
    return bool((pair_sums(codes) > LARGEST_SUM).any())
