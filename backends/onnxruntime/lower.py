"""Lower stages for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...ir.operators.qlinear import UNSIGNED_ZERO
from ...ir.program import Stage
from ...loop.errors import StepfoldError
from ..exact import with_unsigned_weights
from ..export import where
from ..onnx.attention import masked_attention_by_products
from ..onnx.blocks import matmul_nbits
from ..onnx.emit import emit
from ..quantizers import in_floats
from .census import require_integer_products
from .options import OnnxruntimeOptions
from .session import DEFAULTS

aten = torch.ops.aten


def _quantize_dynamic(x: torch.Tensor) -> Any:
    return torch.onnx.ops.symbolic_multi_out(
        "DynamicQuantizeLinear",
        (x,),
        dtypes=(torch.uint8, torch.float32, torch.uint8),
        shapes=(x.shape, (), ()),
        version=11,
    )


def _quantize_static(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=zero.dtype, shape=x.shape, version=21)


def _qlinear(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The contrib operator, because MatMul + Add between Q/DQ pairs becomes a slow float Gemm."""
    zero_code = UNSIGNED_ZERO if weight.dtype is torch.uint8 else 0
    weight_zero = torch.full((weight.shape[1],), zero_code, dtype=weight.dtype)
    inputs = (q, weight, scale, weight_scale, zero, weight_zero, *(() if bias is None else (bias,)))
    return torch.onnx.ops.symbolic(
        "com.microsoft::MatMulIntegerToFloat",
        inputs,
        dtype=torch.float32,
        shape=(*q.shape[:-1], weight.shape[1]),
        version=1,
    )


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value),
        {"q_num_heads": heads, "kv_num_heads": heads, "scale": scale},
        dtype=query.dtype,
        shape=(*query.shape[:-1], value.shape[2]),
        version=23,
    )


def _rotary(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, heads_first: bool) -> torch.Tensor:
    """The contrib form, whose tables belong to positions from the first on; that of ONNX has one for each sample."""
    turned = x if heads_first else x.flatten(2)
    inputs = (turned, torch.zeros(1, dtype=torch.int64), cosine, sine)
    turned = torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding", inputs, {"interleaved": 1}, dtype=x.dtype, shape=turned.shape, version=1
    )
    return turned if heads_first else turned.unflatten(2, x.shape[2:])


def _group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    """Two operators that have kernels: the engine takes `GroupNormalization` apart into twenty.

    Groups are normalized as if they were channels; a batch norm of mean 0 and variance 1 is weight and bias.
    """
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    plain = (torch.ones(groups), torch.zeros(groups))
    normed = torch.onnx.ops.symbolic(
        "InstanceNormalization", (grouped, *plain), {"epsilon": epsilon}, dtype=x.dtype, shape=grouped.shape, version=22
    )
    ones, zeros = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    weight, bias = ones if weight is None else weight, zeros if bias is None else bias
    inputs = (normed.reshape(x.shape), weight, bias, zeros, ones)
    return torch.onnx.ops.symbolic(
        "BatchNormalization", inputs, {"epsilon": 0.0}, dtype=x.dtype, shape=x.shape, version=15
    )


ON_CPU_ONLY = (
    torch.ops.stepfold.quantize_dynamic.default,
    torch.ops.stepfold.qlinear.default,
)
"""Operators whose form here has no kernel for GPUs."""

LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.stepfold.quantize_dynamic.default: _quantize_dynamic,
    torch.ops.stepfold.quantize_static.default: _quantize_static,
    torch.ops.stepfold.qlinear.default: _qlinear,
    torch.ops.stepfold.blocked_linear.default: matmul_nbits,
    torch.ops.stepfold.attention.default: _attention,
    torch.ops.stepfold.rotary.default: _rotary,
    aten.group_norm.default: _group_norm,
    aten.scaled_dot_product_attention.default: masked_attention_by_products,
}


def lower(stage: Stage, folder: Path, *, options: OnnxruntimeOptions = DEFAULTS) -> Path:
    """Write the stage as `<name>.onnx` into a folder and return the file.

    Raises:
        StepfoldError: the stage has no ONNX form, or ONNX Runtime runs its quantized layers in float, or, with the
            provider of a GPU, on the CPU.
    """
    if options.provider != "cpu":
        _refuse_integers(stage, options)
    stage = in_floats(with_unsigned_weights(stage))
    path = folder / f"{stage.name}.onnx"
    emit(stage, path, LOWERINGS)
    require_integer_products(stage, path)
    return path


def _refuse_integers(stage: Stage, options: OnnxruntimeOptions) -> None:
    """Raise StepfoldError where a layer has a kernel on the CPU only, to which ONNX Runtime would copy its input."""
    nodes = [node for node in stage.graph.graph.nodes if node.target in ON_CPU_ONLY]
    if nodes:
        raise StepfoldError(
            f"stage {stage.name}: {where(nodes[0])}: expected operators that the provider {options.provider!r} has; "
            f"{nodes[0].target} and {len(nodes) - 1} more would run on the CPU. Take --recipe fp32, or --backend "
            "tensorrt for quantized layers."
        )
