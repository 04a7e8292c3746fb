"""Multi-head attention on values whose heads are not split yet."""

from __future__ import annotations

import torch
from torch import fx

from .record import Arguments, operator


def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))


def _flops(node: fx.Node) -> int:
    B, T, D = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    keys, width = node.args[2].meta["val"].shape[1:]  # type: ignore[union-attr]
    return 2 * B * T * keys * (D + width)


def _examples() -> list[Arguments]:
    query, key, value = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    return [(query, key, value, 2, 0.5), (query, query, query, 1, 8**-0.5)]


@operator(shape=_shape, examples=_examples, flops=_flops)
def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """Multi-head attention on unsplit values (ONNX `Attention`, opset 23, in its 3-D form).

    Args:
        query: [B, T, D] with D = H K.
        key: [B, T', D].
        value: [B, T', D].
        heads: H.
        scale: multiplies the logits.

    Returns:
        [B, T, D].
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    merged = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    return merged.reshape(query.shape[0], query.shape[1], value.shape[2])
