"""Complex arithmetic, as rotary embeddings use it, in real numbers: engines have no complex dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ...ir.edit import add_buffer
from ...ir.program import attribute
from ...ir.rewriting import Refused, call, is_tensor

logger = logging.getLogger(__name__)
aten = torch.ops.aten

Pair = tuple[fx.Node, fx.Node]  # real and imaginary part
Pairs = Mapping[fx.Node, Pair]


def complex_to_real(graph: fx.GraphModule) -> int:
    """view_as_real(view_as_complex(x) z) -> stack(x0 a - x1 b, x0 b + x1 a), with z = a + b i.

    In place; returns how many complex nodes were replaced. Every complex value becomes a pair of real ones:

    - a constant is split into two buffers;
    - `view_as_complex` selects along the trailing axis of 2, `view_as_real` stacks along it;
    - multiplication is written out, layout operators act on both parts.

    When one complex operator has no such form the graph is left alone, and the engine will name that operator.
    """
    nodes = complex_nodes(graph.graph)
    if isinstance(nodes, Refused):
        logger.info("complex numbers stay: %s", nodes.reason)
        return 0
    pairs: dict[fx.Node, Pair] = {}
    for node in nodes:
        with graph.graph.inserting_before(node):
            pairs[node] = FORMS[_kind(node)](graph, node, pairs)
        for user in list(node.users):
            if user.target is aten.view_as_real.default:
                with graph.graph.inserting_before(user):
                    user.replace_all_uses_with(call(graph, user, aten.stack.default, list(pairs[node]), -1))
    graph.graph.eliminate_dead_code()
    return len(nodes)


def complex_nodes(graph: fx.Graph) -> list[fx.Node] | Refused:
    """The complex values of a graph in order, or the first operator on them that has no real form."""
    nodes = [node for node in graph.nodes if _is_complex(node)]
    for node in nodes:
        if _kind(node) not in FORMS:
            return Refused(f"{node.name}: {node.target} has no form in real numbers")
        for user in node.users:
            if not _is_complex(user) and user.target is not aten.view_as_real.default:
                return Refused(f"{user.name}: {user.target} reads a complex value")
    return nodes


def _is_complex(node: Any) -> bool:
    return is_tensor(node) and node.meta["val"].dtype.is_complex


def _kind(node: fx.Node) -> Any:
    return node.op if node.op in ("get_attr", "placeholder") else node.target


def _constant(graph: fx.GraphModule, node: fx.Node, pairs: Pairs) -> Pair:
    value = attribute(graph, str(node.target))
    parts = []
    for suffix, part in (("real", value.real), ("imaginary", value.imag)):
        name = f"{str(node.target).replace('.', '_')}_{suffix}"
        if not hasattr(graph, name):
            add_buffer(graph, name, part.contiguous().clone())
        parts.append(graph.graph.get_attr(name))
        parts[-1].meta = {"val": torch.real(node.meta["val"]), "shape": node.meta["shape"]}
    return parts[0], parts[1]


def _from_pairs(graph: fx.GraphModule, node: fx.Node, pairs: Pairs) -> Pair:
    x = node.args[0]
    return call(graph, node, aten.select.int, x, -1, 0), call(graph, node, aten.select.int, x, -1, 1)


def _product(graph: fx.GraphModule, node: fx.Node, pairs: Pairs) -> Pair:
    def mul(x: Any, y: Any) -> fx.Node:
        return call(graph, node, aten.mul.Tensor, x, y)

    x, y = node.args
    if x not in pairs or y not in pairs:
        (real, imaginary), factor = (pairs[x], y) if x in pairs else (pairs[y], x)  # type: ignore[index]
        return mul(real, factor), mul(imaginary, factor)
    (a, b), (c, d) = pairs[x], pairs[y]  # type: ignore[index]
    real = call(graph, node, aten.sub.Tensor, mul(a, c), mul(b, d))
    return real, call(graph, node, aten.add.Tensor, mul(a, d), mul(b, c))


def _layout(graph: fx.GraphModule, node: fx.Node, pairs: Pairs) -> Pair:
    def part(index: int) -> fx.Node:
        arguments = fx.map_arg(node.args, lambda source: pairs[source][index] if source in pairs else source)
        return call(graph, node, node.target, *arguments)

    return part(0), part(1)


FORMS: dict[Any, Callable[[fx.GraphModule, fx.Node, Pairs], Pair]] = {
    "get_attr": _constant,
    aten.view_as_complex.default: _from_pairs,
    aten.mul.Tensor: _product,
    aten.cat.default: _layout,
    aten.expand.default: _layout,
    aten.permute.default: _layout,
    aten.reshape.default: _layout,
    aten.select.int: _layout,
    aten.slice.Tensor: _layout,
    aten.squeeze.dim: _layout,
    aten.transpose.int: _layout,
    aten.unsqueeze.default: _layout,
}
"""For each complex operator, and for constants, its form on pairs."""
