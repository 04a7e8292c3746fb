"""The `stepfold::` operators: PyTorch reference, fake kernel and cost of each.

Every backend that can run one adds its lowering (`stepfold.backends.<engine>.lower`); the reference is what
verification, calibration and backend tests compare with.
"""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from . import blocked, decoded, rotary  # noqa: F401  (register operators of their own)
from .cost import FORMULAS

UINT8_STEPS = 255
UNSIGNED_ZERO = 128
"""The code of zero in unsigned weights."""


@torch.library.custom_op("stepfold::quantize_dynamic", mutates_args=())
def quantize_dynamic(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a whole tensor to uint8 by its own range (ONNX `DynamicQuantizeLinear`).

    Args:
        x: [..., M] float32.

    Returns:
        q [..., M] uint8, scale [] float32, zero point [] uint8 with `x ~ scale (q - zero)`.
    """
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / UINT8_STEPS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(-low / scale).clamp(0, UINT8_STEPS)
    q = (torch.round(x / scale) + zero).clamp(0, UINT8_STEPS).to(torch.uint8)
    return q, scale, zero.to(torch.uint8)


@quantize_dynamic.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(()), x.new_empty((), dtype=torch.uint8)


@torch.library.custom_op("stepfold::quantize_static", mutates_args=())
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


@quantize_static.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=zero.dtype)


@torch.library.custom_op("stepfold::qlinear", mutates_args=())
def qlinear(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`scale (q - zero) (weight weight_scale) + bias` with the product in integers, exact for all codes.

    Args:
        q: [..., M] uint8 or int8 activations.
        scale: [] float32, or half precision.
        zero: [] of the type of `q`.
        weight: [M, N] int8, the form that integer GEMMs are fast on; or uint8 with zero at `UNSIGNED_ZERO`.
        weight_scale: [N] of the type of `scale`, one per output channel.
        bias: [N] of that type, or None.

    Returns:
        [..., N] float32.
    """
    codes = weight.to(torch.float32) - (UNSIGNED_ZERO if weight.dtype is torch.uint8 else 0)
    product = (q.to(torch.float32) - zero.to(torch.float32)) @ codes
    result = product * (scale.to(torch.float32) * weight_scale.to(torch.float32))
    return result if bias is None else result + bias


@qlinear.register_fake
def _(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], weight.shape[1]), dtype=torch.float32)


def _qlinear_flops(node: fx.Node) -> int:
    weight = node.args[3]
    assert isinstance(weight, fx.Node)
    return 2 * prod(node.meta["val"].shape) * weight.meta["val"].shape[0]


FORMULAS[torch.ops.stepfold.qlinear.default] = _qlinear_flops


@torch.library.custom_op("stepfold::attention", mutates_args=())
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


@attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))


def _attention_flops(node: fx.Node) -> int:
    B, T, D = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    keys, width = node.args[2].meta["val"].shape[1:]  # type: ignore[union-attr]
    return 2 * B * T * keys * (D + width)


FORMULAS[torch.ops.stepfold.attention.default] = _attention_flops

OPERATORS = (
    torch.ops.stepfold.quantize_dynamic.default,
    torch.ops.stepfold.quantize_static.default,
    torch.ops.stepfold.qlinear.default,
    torch.ops.stepfold.blocked_linear.default,
    torch.ops.stepfold.round_fp8.default,
    torch.ops.stepfold.decode_fp8.default,
    torch.ops.stepfold.round_nvfp4.default,
    torch.ops.stepfold.decode_nvfp4.default,
    torch.ops.stepfold.decode_codebook.default,
    torch.ops.stepfold.attention.default,
    torch.ops.stepfold.rotary.default,
)
"""All operators of this namespace; a backend either lowers or refuses each."""
