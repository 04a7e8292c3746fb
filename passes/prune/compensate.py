"""What the kept channels can give back of the removed ones, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .moments import Moments

DAMPING = 1e-3
"""Added to the diagonal, relative to its mean."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer y = W x + b in float64: weight [N, M], bias [N] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def without(layer: Layer, kept: torch.Tensor) -> Layer:
    """The layer with zeros in the columns that are not kept [M], and nothing in their place."""
    return Layer(layer.weight * kept, layer.bias)


def with_mean(layer: Layer, kept: torch.Tensor, moments: Moments) -> Layer:
    """b' = b + W_P mu_P: the removed channels P are replaced by their means (FLAP, arXiv 2312.11983)."""
    if layer.bias is None:
        return without(layer, kept)
    return Layer(layer.weight * kept, layer.bias + layer.weight @ (moments.mean * ~kept))


def least_squares(layer: Layer, kept: torch.Tensor, moments: Moments) -> Layer:
    """W'_S = W_S + W_P C_PS (C_SS + l I)^-1 and b' = b + W mu - W' mu: least error of outputs without the channels P.

    C is the covariance; a layer without a bias is fitted to the Gram matrix instead.

    Args:
        layer: the whole layer.
        kept: [M] which channels are kept.
        moments: moments of what it reads, with a Gram matrix.

    Returns:
        The layer with zeros in the other columns. With all channels kept, the layer itself.
    """
    if bool(kept.all()):
        return layer
    C = covariance(layer, moments)
    weight = torch.zeros_like(layer.weight)
    weight[:, kept] = layer.weight[:, kept] + layer.weight[:, ~kept] @ regression(C, kept)
    if layer.bias is None:
        return Layer(weight, None)
    return Layer(weight, layer.bias + (layer.weight - weight) @ moments.mean)


def lost(layer: Layer, changed: Layer, moments: Moments) -> float:
    """Mean square error of the outputs of a changed layer, as the Gram matrix has it."""
    assert moments.gram is not None
    difference = layer.weight - changed.weight
    shift = torch.zeros(len(difference), dtype=torch.float64)
    if layer.bias is not None and changed.bias is not None:
        shift = layer.bias - changed.bias
    square = ((difference @ moments.gram) * difference).sum()
    return float(square + 2 * shift @ (difference @ moments.mean) + shift @ shift)


def covariance(layer: Layer, moments: Moments) -> torch.Tensor:
    """[M, M] of what the layer reads; the Gram matrix for a layer whose bias cannot take the mean."""
    assert moments.gram is not None
    return moments.gram if layer.bias is None else moments.gram - torch.outer(moments.mean, moments.mean)


def regression(C: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[removed, kept] what the kept channels S say about the removed ones P: C_PS (C_SS + l I)^-1."""
    inner = C[kept][:, kept]
    damped = inner + DAMPING * inner.diagonal().mean() * torch.eye(len(inner), dtype=C.dtype)
    return torch.linalg.solve(damped, C[kept][:, ~kept]).T
