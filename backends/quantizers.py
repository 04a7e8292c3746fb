"""Products between quantizers that a model carries, in floats where their codes would saturate without VNNI.

A `fake_quantize` of a captured model is written as a pair of QuantizeLinear and DequantizeLinear, and engines multiply
integers between two such pairs. They choose the order and the signs themselves, so nothing but codes that fit helps
(see `stepfold.ir.pairs`). Other codes are decoded before the engine sees them: it finds no pair, and multiplies floats.
"""

from __future__ import annotations

import torch
from torch import fx

from ..ir.edit import add_buffer, copy_graph, finish
from ..ir.fake_quantize import FAKE_QUANTIZE
from ..ir.pairs import LARGEST_SUM, saturates
from ..ir.program import Stage, attribute

aten = torch.ops.aten
MATRICES = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default)
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)
LAYOUT = (
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
)


def saturating_products(stage: Stage) -> dict[fx.Node, fx.Node]:
    """The products between two quantizers whose codes may saturate, and the quantizer of the second argument of each.

    Codes of stored weights are looked at. In convolutions any two of a filter may meet, because engines order them as
    they like; what is computed at run time may be anything.
    """
    found = {}
    for node in stage.graph.graph.nodes:
        if node.target in (*MATRICES, *CONVOLUTIONS):
            first, second = (_quantizer(argument) for argument in node.args[:2])
            if first is not None and second is not None and _may_saturate(stage, node, second):
                found[node] = second
    return found


def in_floats(stage: Stage) -> Stage:
    """The stage with the second quantizer of each saturating product decoded; its values are the same."""
    products = saturating_products(stage)
    if not products:
        return stage
    graph = copy_graph(stage)
    twins = dict(zip(stage.graph.graph.nodes, graph.graph.nodes, strict=True))
    for quantizer in dict.fromkeys(twins[node] for node in products.values()):
        decoded = _stored(graph, quantizer) or _arithmetic(graph.graph, quantizer)
        decoded.meta = dict(quantizer.meta)
        quantizer.replace_all_uses_with(decoded)
    return finish(stage, graph)


def _quantizer(value: object) -> fx.Node | None:
    """The quantizer that a value comes from, layouts aside."""
    while isinstance(value, fx.Node) and value.target in LAYOUT:
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.target in FAKE_QUANTIZE else None


def _may_saturate(stage: Stage, product: fx.Node, quantizer: fx.Node) -> bool:
    weight = _value(stage.graph, quantizer)
    if weight is None:
        return True
    scale, zero, axis, low, _ = _parameters(stage.graph, quantizer)
    if low >= 0:  # unsigned weights around a zero point, which engines shift as they like
        return True
    codes = torch.round(weight / _along(scale, axis, weight)) + _along(zero, axis, weight)
    if product.target in CONVOLUTIONS:
        filters = codes.flatten(1)
        largest = torch.stack([filters.clamp(min=0), -filters.clamp(max=0)]).topk(min(2, filters.shape[1])).values
        return bool((largest.sum(dim=-1) > LARGEST_SUM).any())
    rows = codes if product.target is aten.linear.default else codes.transpose(-1, -2)
    return saturates(rows.flatten(0, -2))


def _parameters(graph: fx.GraphModule, quantizer: fx.Node) -> tuple[torch.Tensor, torch.Tensor, int | None, int, int]:
    """Scale, zero point, the axis that they belong to, lowest and highest code."""
    values = [_held(graph, argument) for argument in quantizer.args]
    scale, zero = (torch.as_tensor(value) for value in values[1:3])
    if quantizer.target is aten.fake_quantize_per_channel_affine.default:
        return scale, zero, *values[3:6]  # type: ignore[return-value]
    *_, low, high = values
    return scale, zero, None, low, high  # type: ignore[return-value]


def _along(value: torch.Tensor, axis: int | None, weight: torch.Tensor) -> torch.Tensor:
    """A value for each channel in the shape that goes with a weight."""
    return value if axis is None else value.reshape([-1 if i == axis else 1 for i in range(weight.dim())])


def _held(graph: fx.GraphModule, argument: object) -> object:
    stored = isinstance(argument, fx.Node) and argument.op == "get_attr"
    return attribute(graph, str(argument.target)).detach() if stored else argument  # type: ignore[union-attr]


def _value(graph: fx.GraphModule, quantizer: fx.Node) -> torch.Tensor | None:
    """What a quantizer makes of a stored weight, None of anything else."""
    arguments = [_held(graph, argument) for argument in quantizer.args]
    if any(isinstance(argument, fx.Node) for argument in arguments):
        return None
    return quantizer.target(*arguments)  # type: ignore[operator]


def _stored(graph: fx.GraphModule, quantizer: fx.Node) -> fx.Node | None:
    """The decoded weight, stored; None for a quantizer of what is computed."""
    value = _value(graph, quantizer)
    if value is None:
        return None
    name = add_buffer(graph, f"{quantizer.args[0].target}_decoded", value)  # type: ignore[union-attr]
    with graph.graph.inserting_before(quantizer):
        return graph.graph.get_attr(name)


def _arithmetic(graph: fx.Graph, quantizer: fx.Node) -> fx.Node:
    """`(clamp(round(x / scale) + zero, low, high) - zero) scale`, for one scale."""
    x, scale, zero, *_, low, high = quantizer.args
    with graph.inserting_before(quantizer):
        value = graph.call_function(aten.round.default, (graph.call_function(aten.div.Tensor, (x, scale)),))
        value = graph.call_function(aten.add.Tensor, (value, zero))
        value = graph.call_function(aten.clamp.default, (value, low, high))
        value = graph.call_function(aten.sub.Tensor, (value, zero))
        return graph.call_function(aten.mul.Tensor, (value, scale))
