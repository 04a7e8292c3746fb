"""Weights whose runs are named by their place in a codebook."""

from __future__ import annotations

import torch

from .record import Arguments, operator


def _shape(indices: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codebook.new_empty((indices.shape[0], indices.shape[1] * codebook.shape[1]))


def _examples() -> list[Arguments]:
    return [(torch.randint(0, 6, (4, 4), dtype=torch.uint8), torch.randn(6, 2), torch.rand(4))]


@operator(shape=_shape, examples=_examples, weight=0)
def decode_codebook(indices: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight [N, M] float32 whose runs are named by their place in a codebook.

    Args:
        indices: [N, M / run] uint8.
        codebook: [codewords, run] float32.
        scale: [N] float32.
    """
    return codebook[indices.long()].flatten(1) * scale[:, None]
