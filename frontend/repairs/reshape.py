"""Views become reshapes, so that no rewrite has to care how a tensor lies in memory."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.rewriting import Rewrite, call

aten = torch.ops.aten


class ViewToReshape(Rewrite[list[object]]):
    """view(x, s) -> reshape(x, s).

    A view asks for strides that fit. A pass that removes a copy or replaces an operator changes strides, and the
    graph would fail at run time; a reshape copies when it must and is a view otherwise.
    """

    name: ClassVar[str] = "view-to-reshape"
    roots: ClassVar[Collection[Any]] = frozenset({aten.view.default, aten._unsafe_view.default})

    def match(self, node: fx.Node) -> list[object]:
        """The target sizes."""
        return list(node.args[1])  # type: ignore[arg-type]

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: list[object]) -> fx.Node:
        """The reshape."""
        replacement = call(graph, node, aten.reshape.default, node.args[0], match)
        replacement.meta = dict(node.meta)
        return replacement
