"""Attention masks that stand for every query at once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.rewriting import Refused, Rewrite, call, is_tensor, shape_of

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
MASK = 3  # position of the mask among the arguments


class ExpandedMask(Rewrite[int]):
    """sdpa(q, k, v, mask [..., 1, S]) -> sdpa(q, k, v, expand(mask) [..., T, S]), for T queries and S keys.

    PyTorch broadcasts the mask over the queries; the Attention operator of ONNX Runtime wants it written out.
    """

    name: ClassVar[str] = "mask"
    roots: ClassVar[Collection[Any]] = frozenset({SDPA})

    def match(self, node: fx.Node) -> int | Refused:
        """The number of queries."""
        mask = _mask(node)
        if mask is None:
            return Refused("it has no mask")
        query = node.args[0]
        assert isinstance(query, fx.Node)
        queries, rows = shape_of(query)[-2], shape_of(mask)[-2]
        if rows != 1 or queries in (1, None):
            return Refused("its mask has a row for each query")
        return queries

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: int) -> fx.Node:
        """The attention with the mask written out."""
        mask = _mask(node)
        assert mask is not None
        sizes = [-1] * (len(shape_of(mask)) - 2) + [match, -1]
        expanded = call(graph, node, aten.expand.default, mask, sizes)
        arguments = [expanded if argument is mask else argument for argument in node.args]
        keywords = {name: expanded if value is mask else value for name, value in node.kwargs.items()}
        replacement = graph.graph.call_function(SDPA, tuple(arguments), keywords)
        replacement.meta = dict(node.meta)
        return replacement


def _mask(node: fx.Node) -> fx.Node | None:
    mask = node.args[MASK] if len(node.args) > MASK else node.kwargs.get("attn_mask")
    return mask if is_tensor(mask) else None  # type: ignore[return-value]
