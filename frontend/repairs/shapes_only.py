"""Operators that read of a tensor its shape or type only: what they need is written out, so that they need no tensor.

`zeros_like(x)` does not depend on the values of x. Where x changes at every step, it would still be needed, and all that
computes it, wherever the zeros are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.rewriting import Refused, Rewrite, call, is_tensor, shape_of

aten = torch.ops.aten

LIKE: dict[Any, float | None] = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.full_like.default: None,
}
NEW: dict[Any, float | None] = {aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.new_full.default: None}
"""What they fill a tensor with; None where the last of their arguments says so."""


class FilledLike(Rewrite[tuple[list[Any], Any]]):
    """zeros_like(x) -> full([sym_size(x, 0), ...], 0), new_zeros(x, sizes) -> full(sizes, 0), and so for ones and others."""

    name: ClassVar[str] = "filled-like"
    roots: ClassVar[Collection[Any]] = frozenset({*LIKE, *NEW})

    def match(self, node: fx.Node) -> tuple[list[Any], Any] | Refused:
        """The sizes, with None for those of the batch, and the value."""
        source = node.args[0]
        if not is_tensor(source):
            return Refused("its input is not one tensor")
        assert isinstance(source, fx.Node)
        fill = LIKE.get(node.target, NEW.get(node.target))
        value = node.args[-1] if fill is None else fill
        sizes = list(node.args[1]) if node.target in NEW else list(shape_of(source))  # type: ignore[arg-type]
        return sizes, value

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: tuple[list[Any], Any]) -> fx.Node:
        """The filled tensor, of sizes."""
        sizes, value = match
        written = [_size(graph, node, d) if size is None else size for d, size in enumerate(sizes)]
        filled = graph.graph.call_function(aten.full.default, (written, value), {"dtype": node.meta["val"].dtype})
        filled.meta = dict(node.meta)
        return filled


class GivenLike(Rewrite[fx.Node]):
    """type_as(y, x) -> y of the type of x; expand_as(y, x) -> expand(y, sizes of x)."""

    name: ClassVar[str] = "given-like"
    roots: ClassVar[Collection[Any]] = frozenset({aten.type_as.default, aten.expand_as.default})

    def match(self, node: fx.Node) -> fx.Node | Refused:
        """The tensor y."""
        source = node.args[0]
        return source if is_tensor(source) else Refused("its input is not one tensor")  # type: ignore[return-value]

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: fx.Node) -> fx.Node:
        """y with its type or sizes written out."""
        if node.target is aten.expand_as.default:
            sizes = [_size(graph, node, d, 1) if s is None else s for d, s in enumerate(shape_of(node))]
            return call(graph, node, aten.expand.default, match, sizes)
        if match.meta["val"].dtype is node.meta["val"].dtype:
            return match
        cast = graph.graph.call_function(aten._to_copy.default, (match,), {"dtype": node.meta["val"].dtype})
        cast.meta = dict(node.meta)
        return cast


def _size(graph: fx.GraphModule, node: fx.Node, dimension: int, argument: int = 0) -> fx.Node:
    """The size of an argument, which follows the batch."""
    return call(graph, node, aten.sym_size.int, node.args[argument], dimension)
