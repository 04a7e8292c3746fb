"""A stage in half precision, for engines whose networks are strongly typed: every value has the type it is written with.

The stage stays a stage: its ports keep their types and it runs in PyTorch, so what the rounding costs is measured
before any engine is asked. The rules are those of automatic mixed precision. Products run in half precision. Norms,
reductions and the functions that timesteps go through run in float32, and what they give stays in float32 until the
next product. An elementwise operator on both kinds runs in float32, except that weights and single numbers follow
the other argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ...ir.edit import add_buffer, copy_graph, finish
from ...ir.program import Stage, attribute
from ...loop.errors import StepfoldError

aten = torch.ops.aten

PRODUCTS = (
    aten.linear,
    aten.matmul,
    aten.mm,
    aten.bmm,
    aten.addmm,
    aten.baddbmm,
    aten.einsum,
    aten.conv1d,
    aten.conv2d,
    aten.conv3d,
    aten.conv_transpose2d,
    aten.convolution,
    aten.scaled_dot_product_attention,
    torch.ops.stepfold.attention,
    torch.ops.stepfold.quantize_static,
    torch.ops.stepfold.qlinear,
    torch.ops.stepfold.blocked_linear,
    torch.ops.stepfold.round_fp8,
    torch.ops.stepfold.decode_fp8,
)
"""Operators that run in half precision; the scales of integer ones have the type of what they scale."""

EXACT = (
    aten.layer_norm,
    aten.native_layer_norm,
    aten.rms_norm,
    aten.group_norm,
    aten.native_group_norm,
    aten.softmax,
    aten._softmax,
    aten.pow,
    aten.exp,
    aten.log,
    aten.rsqrt,
    aten.reciprocal,
    aten.sin,
    aten.cos,
    aten.mean,
    aten.sum,
    aten.var,
    aten.cumsum,
    torch.ops.stepfold.round_nvfp4,
    torch.ops.stepfold.decode_nvfp4,
)
"""Operators that run in float32: their sums or scales leave the range of half precision, or their arguments need its
digits."""


def at_precision(stage: Stage, dtype: torch.dtype) -> Stage:
    """The stage with products in half precision; its inputs and outputs keep their types.

    Args:
        stage: stage in float32.
        dtype: `torch.float16` or `torch.bfloat16`; `torch.float32` returns the stage as it is.

    Raises:
        StepfoldError: a weight is out of the range of `dtype`.
    """
    if dtype is torch.float32:
        return stage
    writer = _Writer(stage, dtype)
    for node in stage.graph.graph.nodes:
        writer.write(node)
    return finish(stage, writer.module())


@dataclass
class _Value:
    """A value of the new graph; `dtype` is None for what is not floating point, `follows` for weights."""

    node: fx.Node
    dtype: torch.dtype | None
    follows: bool = False


@dataclass
class _Writer:
    """Writes the nodes of a stage into a new graph, one after the other."""

    stage: Stage
    half: torch.dtype
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, _Value] = field(default_factory=dict)
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = copy_graph(self.stage)  # weights in another type are added to those that are there
        self.ports = dict(zip(self.stage.graph.graph.find_nodes(op="placeholder"), self.stage.inputs, strict=True))

    def module(self) -> fx.GraphModule:
        """The graph with its weights."""
        return fx.GraphModule(self.root, self.graph)

    def write(self, node: fx.Node) -> None:
        """Write one node; those that it reads are written."""
        if node.op == "output":
            results = node.args[0]
            assert isinstance(results, (tuple, list))
            kept = zip(results, self.stage.outputs, strict=True)
            self.graph.output(tuple(self._cast(self.values[n], getattr(torch, port.dtype)) for n, port in kept))  # type: ignore[index]
        elif node.op == "placeholder":
            self._write_input(node)
        elif node.op == "get_attr":
            self._write_weight(node)
        else:
            self._write_call(node)

    def _write_input(self, node: fx.Node) -> None:
        """Inputs become half precision at once, but numbers such as the timestep keep their digits."""
        value = _Value(self.graph.node_copy(node), torch.float32 if _is_float(node) else None)
        if value.dtype is not None and len(self.ports[node].shape) > 1:
            value = _Value(self._cast(value, self.half), self.half)
        self.values[node] = value

    def _write_weight(self, node: fx.Node) -> None:
        self.values[node] = _Value(self.graph.node_copy(node), torch.float32 if _is_float(node) else None, True)

    def _write_call(self, node: fx.Node) -> None:
        dtype = self._dtype_of_call(node)

        def argument(old: fx.Node) -> fx.Node:
            value = self.values[old]
            return value.node if value.dtype is None or dtype is None else self._cast(value, dtype)

        new = self.graph.create_node(
            "call_function",
            node.target,
            fx.map_arg(node.args, argument),
            fx.map_arg(node.kwargs, argument),
            node.name,
        )
        new.meta = dict(node.meta)
        if not _is_float(node):
            self.values[node] = _Value(new, None)
        elif node.target is torch.ops.stepfold.qlinear.default:  # the reference sums in float32
            self.values[node] = _Value(self._convert(new, self.half), self.half)
        else:
            explicit = node.kwargs.get("dtype") is torch.float32
            self.values[node] = _Value(new, torch.float32 if explicit or dtype is None else dtype)

    def _dtype_of_call(self, node: fx.Node) -> torch.dtype | None:
        """The type that the floating-point arguments of a call get; None when it has none."""
        read = [self.values[old] for old in node.all_input_nodes if self.values[old].dtype is not None]
        if not read:
            return None
        packet = getattr(node.target, "overloadpacket", None)
        if packet in PRODUCTS:
            return self.half
        if packet in EXACT:
            return torch.float32
        firm = {value.dtype for value in read if not (value.follows or _is_number(value.node))}
        return torch.float32 if torch.float32 in firm else self.half

    def _cast(self, value: _Value, dtype: torch.dtype) -> fx.Node:
        """A value in another type; a weight is stored in it."""
        if value.dtype is None or value.dtype is dtype:
            return value.node
        key = (value.node, dtype)
        if key not in self.casts:
            self.casts[key] = self._stored(value.node, dtype) if value.follows else self._convert(value.node, dtype)
        return self.casts[key]

    def _convert(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        new = self.graph.call_function(aten.to.dtype, (node, dtype))
        new.meta = {
            key: node.meta[key] for key in ("val", "shape", "nn_module_stack", "stack_trace") if key in node.meta
        }
        return new

    def _stored(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        weight = attribute(self.stage.graph, str(node.target))
        stored = weight.detach().to(dtype)
        if not torch.isfinite(stored).all() and torch.isfinite(weight).all():
            raise StepfoldError(
                f"stage {self.stage.name}: weight {node.target}: expected values up to {torch.finfo(dtype).max:g}, the "
                f"range of {str(dtype).removeprefix('torch.')}; received {float(weight.abs().max()):g}. Choose bf16."
            )
        name = add_buffer(self.root, f"{node.target}_{str(dtype).removeprefix('torch.')}", stored)
        with self.graph.inserting_before(node.next):
            new = self.graph.get_attr(name)
        new.meta = dict(node.meta)
        return new


def _is_float(node: fx.Node) -> bool:
    """Whether a node is a float32 tensor, or a list of them."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float32 for leaf in leaves)


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 0
