"""Lower stages for TensorRT: ONNX with static symmetric Q/DQ, a strongly typed network, a plan."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ...bundle.manifest import PortEntry
from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ...ir.program import Stage, attribute
from ...loop.errors import StepfoldError
from ..export import where
from ..onnx.attention import attention_by_products, products
from ..onnx.blocks import BLOCKED_LINEAR, block_size, dequantized_blocks, rounds, with_signed_blocks
from ..onnx.decoded import PAIRS
from ..onnx.emit import emit
from ..onnx.fp4 import DECODE as DECODE_FP4
from ..onnx.fp4 import LOWERINGS as FP4
from ..onnx.fp4 import with_fp4_weights
from ..onnx.precision import at_precision
from .build import BuildFailure, Plan, build
from .description import PlanDescription
from .network import ParserRefusal
from .options import TensorrtOptions
from .provider import Provider, provider
from .refusal import explained

aten = torch.ops.aten

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCK_BITS = (4, 8)
WITHOUT_FP4 = ("SM75", "SM80", "SM86", "SM89")
SYMMETRIC = "expected int8 activations with a stored scale and zero point 0, the only ones of TensorRT"
INSTEAD = "Choose --set quantize.activations=symmetric, or the recipe trt-fp8."


def _quantize_static(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    inputs = (x, scale.to(x.dtype), zero)
    return torch.onnx.ops.symbolic("QuantizeLinear", inputs, dtype=torch.int8, shape=x.shape, version=21)


def _dequantize(q: torch.Tensor, scale: torch.Tensor, **attributes: Any) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (q, scale), attributes, dtype=scale.dtype, shape=q.shape, version=21
    )


def _qlinear(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A float product of dequantized values, which the engine computes in integers; its type is that of the scales."""
    product = _dequantize(q, scale) @ _dequantize(weight, weight_scale, axis=1)
    return product if bias is None else product + bias


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """ONNX `Attention` becomes an operator that the engine refuses to take apart where it has no kernel, as in float32."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return products(q, k, v, None, scale).transpose(1, 2).flatten(2)


LOWERINGS: dict[Any, Callable[..., Any]] = {
    **PAIRS,
    **FP4,
    torch.ops.stepfold.quantize_static.default: _quantize_static,
    torch.ops.stepfold.qlinear.default: _qlinear,
    BLOCKED_LINEAR: dequantized_blocks,
    torch.ops.stepfold.attention.default: _attention,
    aten.scaled_dot_product_attention.default: attention_by_products,
}


def lower(stage: Stage, folder: Path, options: TensorrtOptions) -> Path:
    """Write the stage as `<name>.engine` into a folder, its description and the build log beside it.

    With the option `keep_graph`, `<name>.onnx` is what the plan was built from.

    Raises:
        UsageError: the provider cannot be used here, or not for this compute capability.
        StepfoldError: the stage has no form for this engine, or building it fails; the message names the node, its
            module and source line, and the file with the smallest part that fails.
    """
    chosen = provider(options.provider)
    with tempfile.TemporaryDirectory(prefix="stepfold-") as temporary:
        model = (folder if options.keep_graph else Path(temporary)) / f"{stage.name}.onnx"
        emit(with_fp4_weights(prepare(stage, options)), model, LOWERINGS, with_signed_blocks)
        try:
            plan = build(chosen, model, options)
        except (ParserRefusal, BuildFailure) as error:
            raise StepfoldError(f"stage {stage.name}: {explained(error, chosen, model, options)}") from error
    _check_ports(stage, plan)
    return _write(stage, folder, plan, chosen, options)


def prepare(stage: Stage, options: TensorrtOptions) -> Stage:
    """The stage as the engine computes it, still executable in PyTorch.

    Raises:
        StepfoldError: activations are quantized in a way that the engine has not, or weights in one that the GPU has not.
    """
    for node in stage.graph.graph.nodes:
        if node.op == "call_function":
            _refuse_activations(stage, node)
            _refuse_blocks(stage, node)
    _refuse_fp4(stage, options)
    return at_precision(stage, PRECISIONS[options.precision])


def _refuse_fp4(stage: Stage, options: TensorrtOptions) -> None:
    """Raise StepfoldError where a stage has FP4 layers and the GPU that is built for has no such products."""
    nodes = stage.graph.graph.find_nodes(op="call_function", target=DECODE_FP4)
    if nodes and options.capability in WITHOUT_FP4:
        raise StepfoldError(
            f"stage {stage.name}: {where(nodes[0])}: expected a GPU with FP4 products, SM120 or SM121; received "
            f"{options.capability}. Name another with --set tensorrt.capability=SM120, or choose the recipe trt-fp8."
        )


def _refuse_activations(stage: Stage, node: fx.Node) -> None:
    """Raise StepfoldError where a node quantizes with scales of run time or with a zero point."""
    received = None
    if node.target is torch.ops.stepfold.quantize_dynamic.default:
        received = "scales of run time (quantize.activations=dynamic)"
    elif node.target is torch.ops.stepfold.quantize_static.default:
        received = _unfit_scale(stage, *node.args[1:3])
    if received is not None:
        raise StepfoldError(f"stage {stage.name}: {where(node)}: {SYMMETRIC}; received {received}. {INSTEAD}")


def _refuse_blocks(stage: Stage, node: fx.Node) -> None:
    """Raise StepfoldError where a layer with weights in blocks has no form: signed, symmetric, float activations."""
    if node.target is not BLOCKED_LINEAR:
        return
    x, zeros, bits = node.args[0], node.args[3], node.args[5]
    received = None
    if rounds(node):
        received = "activations rounded in 8 bits at run time (quantize.activations=dynamic)"
    elif bits not in BLOCK_BITS:
        received = f"weights of {bits} bits"
    elif zeros is not None:
        received = "zero points of weights"
    elif x.meta["val"].shape[-1] % block_size(node):  # type: ignore[union-attr]
        received = f"blocks of {block_size(node)} for {x.meta['val'].shape[-1]} features"  # type: ignore[union-attr]
    if received is not None:
        raise StepfoldError(
            f"stage {stage.name}: {where(node)}: expected symmetric weights of 4 or 8 bits in whole blocks and float "
            f"activations, the form of TensorRT; received {received}. Choose --set quantize.activations=float, or the "
            "recipe trt-fp8."
        )


def _unfit_scale(stage: Stage, scale: Any, zero: Any) -> str | None:
    """What is wrong with the scale and zero point of a `quantize_static`, or None."""
    if scale.op != "get_attr" or zero.op != "get_attr":
        return "a scale that is chosen at run time"
    point = attribute(stage.graph, str(zero.target))
    if point.dtype is torch.int8 and not point.any():
        return None
    return f"{str(point.dtype).removeprefix('torch.')} with zero point {int(point)} (quantize.activations=static)"


def _check_ports(stage: Stage, plan: Plan) -> None:
    """The network has the ports of the stage, with a batch where it has one."""
    expected = ({str(port) for port in stage.inputs}, {str(port) for port in stage.outputs})
    received = ({str(port) for port in plan.inputs}, {str(port) for port in plan.outputs})
    if expected != received:
        missing = sorted((expected[0] | expected[1]) ^ (received[0] | received[1]))
        raise StepfoldError(f"stage {stage.name}: expected a network with its ports; different are {missing}.")


def _write(stage: Stage, folder: Path, plan: Plan, chosen: Provider, options: TensorrtOptions) -> Path:
    path = folder / f"{stage.name}.engine"
    path.write_bytes(plan.engine)
    PlanDescription(
        provider=chosen.name,
        provider_version=chosen.version or "unknown",
        capability=plan.capability,
        precision=options.precision,
        batch=plan.batch,
        inputs=tuple(PortEntry.of(port) for port in plan.inputs),
        outputs=tuple(PortEntry.of(port) for port in plan.outputs),
        layers=plan.layers,
    ).write(path)
    log = "".join(f"{message}\n" for message in plan.log)
    path.with_name(path.name + ".log").write_text(log, encoding="utf-8")
    return path
