"""Attention as two products and a softmax, for engines whose ONNX `Attention` does less than PyTorch's."""

from __future__ import annotations

from typing import Any

import torch

USUAL = torch.ops.aten.scaled_dot_product_attention.default
"""A lowering that calls this keeps the translation of the exporter, into ONNX `Attention`."""


def products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """`softmax(scale q k' + mask) v`, which TensorRT fuses where it has a kernel.

    Args:
        query: [B, H, T, K]; `key` and `value` may have another number of tokens.
        key: [B, H, T, K].
        value: [B, H, T, K].
        mask: mask of any shape that broadcasts to the logits: floats are added, False leaves a key out. A query
            without any key takes the mean of the values, where PyTorch has zeros.
        scale: factor of the logits; None for `1 / sqrt(K)`.

    Returns:
        [B, H, T, K], of the type of the query.
    """
    logits = (query * (scale if scale is not None else query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
    if mask is not None:
        if mask.dtype is torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
        logits = logits + mask
    return torch.softmax(logits, dim=-1) @ value


def attention_by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """A lowering of `scaled_dot_product_attention`: `products`, but for causal masks and repeated heads.

    The exporter's translation of those two already consists of masks and copies that engines take.
    """
    if is_causal or enable_gqa:
        return USUAL(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return products(query, key, value, attn_mask, scale)


def masked_attention_by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *flags: Any,
    **options: Any,
) -> torch.Tensor:
    """The same for engines that have ONNX `Attention`, but none with a mask that broadcasts over queries."""
    lowering = USUAL if attn_mask is None else attention_by_products
    return lowering(query, key, value, attn_mask, *flags, **options)
