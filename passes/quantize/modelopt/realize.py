"""Rewrite linear layers as a quantizer decided: `stepfold::quantize_static` and `stepfold::qlinear`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ....ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ....ir.edit import add_buffer, copy_graph, finish
from ....ir.names import module_path
from ....ir.program import Stage
from ....loop.errors import StepfoldError
from .operands import IntegerOperands, integer_operands
from .read import LinearDecision

LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class _Quantized:
    """A value in integers: codes, scale and zero point."""

    codes: fx.Node
    scale: fx.Node
    zero: fx.Node


def realize(stage: Stage, decisions: Mapping[str, LinearDecision]) -> Stage:
    """The stage with every decided layer in integers; layers that read one value with one scale share its quantization.

    linear(x, W) + b -> s_x s_W (q(x) - z) W_q + b

    Args:
        stage: with float linear layers.
        decisions: by the name of the linear node.

    Raises:
        StepfoldError: a decision is not 8-bit integers, or names no linear layer of the stage.
    """
    graph = copy_graph(stage)
    layers = {node.name: node for node in graph.graph.nodes if node.target is LINEAR}
    unknown = sorted(decisions.keys() - layers.keys())
    if unknown:
        raise StepfoldError(f"stage {stage.name}: expected decisions for its linear layers; received {unknown[0]!r}.")
    known: dict[tuple[fx.Node, float, int], _Quantized] = {}
    for name, node in layers.items():
        if name in decisions:
            _rewrite(graph, node, integer_operands(name, decisions[name]), known)
    return finish(stage, graph)


def _rewrite(
    graph: fx.GraphModule,
    node: fx.Node,
    operands: IntegerOperands,
    known: dict[tuple[fx.Node, float, int], _Quantized],
) -> None:
    source, name = node.args[0], module_path(node)
    assert isinstance(source, fx.Node)
    key = (source, float(operands.scale), int(operands.zero))
    with graph.graph.inserting_before(node):
        if key not in known:
            scale = graph.graph.get_attr(add_buffer(graph, f"{name}.input_scale", operands.scale))
            zero = graph.graph.get_attr(add_buffer(graph, f"{name}.input_zero", operands.zero))
            codes = graph.graph.call_function(torch.ops.stepfold.quantize_static.default, (source, scale, zero))
            known[key] = _Quantized(codes, scale, zero)
        q = known[key]
        weight = graph.graph.get_attr(add_buffer(graph, f"{name}.weight_int8", operands.weight))
        scale = graph.graph.get_attr(add_buffer(graph, f"{name}.weight_scale", operands.weight_scale))
        bias = node.args[2] if len(node.args) > 2 else None
        arguments = (q.codes, q.scale, q.zero, weight, scale, bias)
        new = graph.graph.call_function(torch.ops.stepfold.qlinear.default, arguments)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
