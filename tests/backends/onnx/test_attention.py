"""Attention written as products is what PyTorch computes; each lowering of it leaves alone what its engine takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import component, operators
from stages import MASKS, T

from stepfold.backends.onnx.attention import attention_by_products, masked_attention_by_products, products

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}
attend = torch.nn.functional.scaled_dot_product_attention


def heads(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, size, 4, generator=generator) for size in (T, 4, 4))
    return q, k, v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [None, *MASKS])
@given(seed=st.integers(0, 2**32), scale=st.none() | st.floats(-2, 2))
def test_products_are_attention(name: str | None, dtype: torch.dtype, seed: int, scale: float | None) -> None:
    q, k, v = (x.to(dtype) for x in heads(seed))
    mask = MASKS[name] if name else None
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    received, wanted = products(q, k, v, mask, scale), attend(q, k, v, mask, scale=scale)
    assert received.dtype is dtype
    torch.testing.assert_close(received, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_query_without_keys_takes_the_mean_of_the_values() -> None:
    q, k, v = heads()
    mask = torch.zeros(T, 4, dtype=torch.bool)
    torch.testing.assert_close(products(q, k, v, mask, None), v.mean(2, keepdim=True).expand_as(q))


def kept(function: Callable[..., torch.Tensor]) -> bool:
    """Whether PyTorch's operator is still there when a function of three heads has been traced."""
    return "scaled_dot_product_attention.default" in operators(component(function, *heads()).step)


def test_causal_masks_and_repeated_heads_are_left_to_the_exporter() -> None:
    assert not kept(lambda q, k, v: attention_by_products(q, k, v))
    assert kept(lambda q, k, v: attention_by_products(q, k, v, is_causal=True))
    assert kept(lambda q, k, v: attention_by_products(q, k[:, :1], v[:, :1], MASKS["added"][:1], enable_gqa=True))


def test_only_attention_with_a_mask_is_written_as_products() -> None:
    mask = MASKS["of keys"][:1]
    assert kept(lambda q, k, v: masked_attention_by_products(q, k, v, scale=0.3))
    assert not kept(lambda q, k, v: masked_attention_by_products(q, k, v, mask, 0.0, False, scale=0.3))
    assert kept(lambda q, k, v: masked_attention_by_products(q, k[:, :1], v[:, :1], mask, enable_gqa=True))


@pytest.mark.parametrize("lowering", [attention_by_products, masked_attention_by_products])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"enable_gqa": True}, {"attn_mask": MASKS["of heads"], "scale": 0.3}],
    ids=["plain", "causal", "repeated heads", "masked"],
)
def test_lowerings_are_attention(lowering: Callable[..., torch.Tensor], options: dict[str, Any]) -> None:
    q, k, v = heads()
    if "enable_gqa" in options:
        k, v = k[:, :1], v[:, :1]
    torch.testing.assert_close(lowering(q, k, v, **options), attend(q, k, v, **options))
