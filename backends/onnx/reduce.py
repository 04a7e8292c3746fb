"""The smallest part of an ONNX graph that an engine still refuses, for a report of the failure.

Two bisections, as `polygraphy debug reduce` makes them: the shortest beginning of the graph that fails, then the
latest place that it can start at. What the part reads becomes an input of it, with the type that ONNX infers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
from onnx import NodeProto, ValueInfoProto

Fails = Callable[[onnx.ModelProto], bool]


def reduce(model: onnx.ModelProto, fails: Fails) -> onnx.ModelProto:
    """A part of a model that fails as the whole does.

    Args:
        model: one that fails, with its weights inside.
        fails: whether a model fails in the same way.

    Returns:
        The smallest part that was found; the model itself where no part of it fails alone.
    """
    cutter = _Cutter(model)
    nodes = list(model.graph.node)
    end = _bisect(lambda end: fails(cutter.part(nodes[:end])), 1, len(nodes))
    start = end - _bisect(lambda length: _fails(cutter.part(nodes[end - length : end]), fails), 1, end)
    part = cutter.part(nodes[start:end])
    slim = cutter.part(_ancestors(nodes[start:end]))
    return slim if _fails(slim, fails) else part if _fails(part, fails) else model


def _bisect(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number from `low` to `high` for which `holds`, which is so from there on; it is for `high`."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fails(part: onnx.ModelProto, fails: Fails) -> bool:
    """Whether a part fails; one whose inputs have no known type cannot be judged."""
    typed = all(value.type.tensor_type.elem_type for value in part.graph.input)
    return typed and fails(part)


def _ancestors(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Of a list of nodes, those that the last one is computed from, and itself."""
    needed, kept = set(nodes[-1].output), []
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(node)
            needed |= _reads(node)
    return kept[::-1]


def _reads(node: NodeProto) -> set[str]:
    """Names of the values a node reads, its subgraphs included."""
    inner = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
    return {name for name in node.input if name} | {name for graph in inner for n in graph.node for name in _reads(n)}


class _Cutter:
    """Makes models of some of the nodes of a model."""

    def __init__(self, model: onnx.ModelProto):
        self._model = model
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = [*inferred.input, *inferred.value_info, *inferred.output]
        self._types: dict[str, ValueInfoProto] = {value.name: value for value in values}
        self._weights = {weight.name: weight for weight in model.graph.initializer}

    def part(self, nodes: Sequence[NodeProto]) -> onnx.ModelProto:
        """The model of consecutive nodes; its outputs are what they compute and do not read."""
        made = {name for node in nodes for name in node.output if name}
        read = {name: None for node in nodes for name in sorted(_reads(node))}
        returned = {value.name for value in self._model.graph.output}
        ends = [name for node in nodes for name in node.output if name and (name not in read or name in returned)]
        inputs = [self._value(name) for name in read if name not in made and name not in self._weights]
        weights = [self._weights[name] for name in read if name in self._weights]
        outputs = [self._value(name) for name in ends]
        graph = onnx.helper.make_graph(nodes, self._model.graph.name, inputs, outputs, initializer=weights)
        part = onnx.helper.make_model(graph, opset_imports=self._model.opset_import, functions=self._model.functions)
        part.ir_version = self._model.ir_version
        return part

    def _value(self, name: str) -> ValueInfoProto:
        return self._types.get(name) or ValueInfoProto(name=name)
