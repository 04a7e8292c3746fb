"""Stages whose linear layers have symmetric int8 activations, the form TensorRT takes."""

from __future__ import annotations

import torch

from stepfold.ir import operators  # noqa: F401  (registers the stepfold:: operators)
from stepfold.ir.edit import add_buffer, copy_graph, finish
from stepfold.ir.program import Stage, attribute

LEVELS = 127


def symmetric_int8(stage: Stage, largest: float = 4.0) -> Stage:
    """The stage with int8 weights per channel and activations of one scale, those up to `largest` not saturated."""
    graph = copy_graph(stage)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        weight = attribute(graph, str(node.args[1].target)).detach()
        scale = weight.abs().amax(dim=1).clamp(min=1e-8) / LEVELS
        codes = torch.round(weight / scale[:, None]).to(torch.int8).T.contiguous()
        values = (torch.tensor(largest / LEVELS), torch.tensor(0, dtype=torch.int8), codes, scale)
        with graph.graph.inserting_before(node):
            names = [add_buffer(graph, f"{node.name}_{i}", value) for i, value in enumerate(values)]
            step, zero, weight_node, scale_node = (graph.graph.get_attr(name) for name in names)
            q = graph.graph.call_function(torch.ops.stepfold.quantize_static.default, (node.args[0], step, zero))
            bias = node.args[2] if len(node.args) > 2 else None
            arguments = (q, step, zero, weight_node, scale_node, bias)
            new = graph.graph.call_function(torch.ops.stepfold.qlinear.default, arguments)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    return finish(stage, graph)
