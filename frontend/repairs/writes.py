"""Writes into tensors: export turns them into copies and scatters, which engines run slowly."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.rewriting import Refused, Rewrite, call, is_tensor, shape_of

aten = torch.ops.aten
OPEN_END = 1 << 62


class FunctionalCopy(Rewrite[fx.Node]):
    """copy(x, y) -> y, where y has the shape and dtype of x."""

    name: ClassVar[str] = "copy"
    roots: ClassVar[Collection[Any]] = frozenset({aten.copy.default})

    def match(self, node: fx.Node) -> fx.Node | Refused:
        """The tensor that is copied."""
        source = node.args[1]
        if not is_tensor(source):
            return Refused("it copies no tensor")
        assert isinstance(source, fx.Node)
        if source.meta["val"].dtype != node.meta["val"].dtype:
            return Refused("it changes the dtype")
        return source if shape_of(source) == shape_of(node) else Refused("it broadcasts")

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: fx.Node) -> fx.Node:
        """The tensor itself."""
        return match


@dataclass(frozen=True)
class _Halves:
    even: fx.Node
    odd: fx.Node
    dimension: int


class InterleavedWrite(Rewrite[_Halves]):
    """x[..., 0::2] = a; x[..., 1::2] = b -> flatten(stack(a, b)), whatever x held before.

    Wan writes its rotary embedding that way.
    """

    name: ClassVar[str] = "interleaved-write"
    roots: ClassVar[Collection[Any]] = frozenset({aten.slice_scatter.default})

    def match(self, node: fx.Node) -> _Halves | Refused:
        """Both halves and the dimension they alternate along."""
        inner = node.args[0]
        if not isinstance(inner, fx.Node) or inner.target is not aten.slice_scatter.default:
            return Refused("it does not follow another write")
        outer = _stride(node)
        if outer is None or outer[1:] != (1, 2) or _stride(inner) != (outer[0], 0, 2):
            return Refused("the two writes do not alternate")
        dimension = outer[0]
        if (shape_of(node)[dimension] or 1) % 2:
            return Refused("its size is odd or follows the batch")
        even, odd = inner.args[1], node.args[1]
        assert isinstance(even, fx.Node) and isinstance(odd, fx.Node)
        return _Halves(even, odd, dimension)

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: _Halves) -> fx.Node:
        """The stacked halves, flattened."""
        behind = match.dimension + 1
        pairs = call(graph, node, aten.stack.default, [match.even, match.odd], behind)
        return call(graph, node, aten.flatten.using_ints, pairs, match.dimension, behind)


def _stride(node: fx.Node) -> tuple[int, int, int] | None:
    """Dimension, start and step of a write that reaches the end; None for another."""
    _, _, dimension, start, end, step = (*node.args, *(None, None, 0, None, None, 1)[len(node.args) :])
    if end is not None and not (isinstance(end, int) and end >= OPEN_END):
        return None
    return dimension % len(shape_of(node)), start or 0, step  # type: ignore[return-value]
