"""A few nodes of a stage as a stage of their own, which reads what they read and returns what the last one computes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import fx

from ..loop.ports import Port
from .program import Stage
from .shapes import follows_batch, port, propagate


def window(stage: Stage, end: fx.Node, nodes: Collection[fx.Node]) -> tuple[Stage, list[fx.Node]]:
    """Cut a stage down to some of its nodes.

    Args:
        stage: whose shapes are propagated.
        end: the node whose value is returned, a tensor.
        nodes: nodes to keep of those that it is computed from. Nodes that cannot be inputs, as sizes are none and tensors
            whose batch is no first dimension, are kept with them.

    Returns:
        The part, its inputs called as the nodes are, and those nodes in the order of its inputs.
    """
    kept, read = _closure(end, nodes)
    graph = fx.Graph()
    mapping = {node: graph.placeholder(node.name) for node in read}
    for node, placeholder in mapping.items():
        placeholder.meta = dict(node.meta)
    for node in stage.graph.graph.nodes:
        if node in kept:
            mapping[node] = graph.node_copy(node, lambda other: mapping[other])
    graph.output((mapping[end],))
    module = fx.GraphModule(stage.graph, graph)
    inputs: list[Port] = [port(node, node.name) for node in read]
    propagate(module, inputs)
    outputs = (port(mapping[end], f"{end.name}_value"),)
    return replace(stage, graph=module, inputs=tuple(inputs), outputs=outputs), read


def is_tensor(node: fx.Node) -> bool:
    """Whether the value of a node is a tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def _closure(end: fx.Node, nodes: Collection[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
    """The nodes of a part, and those that become its inputs, in the order of the graph."""
    kept, read, stack = set[fx.Node](), set[fx.Node](), [end]
    while stack:
        node = stack.pop()
        if node in kept or node in read:
            continue
        inside = node is end or node in nodes or node.op == "get_attr" or not _can_be_read(node)
        if inside and node.op != "placeholder":
            kept.add(node)
            stack.extend(node.all_input_nodes)
        else:
            read.add(node)
    return kept, [node for node in end.graph.nodes if node in read]


def _can_be_read(node: fx.Node) -> bool:
    """Whether a value can be an input: a tensor whose batch, if it has one, stands first."""
    return is_tensor(node) and (follows_batch(node) or None not in node.meta["shape"])
