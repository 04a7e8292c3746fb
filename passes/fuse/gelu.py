"""The tanh form of GELU as the engine's own kernel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from .rules import NearMiss, Rule


class FuseGelu(Rule[fx.Node]):
    """gelu(x, approximate="tanh") -> fast_gelu(x)."""

    name: ClassVar[str] = "gelu"

    def match(self, node: fx.Node) -> fx.Node | NearMiss | None:
        """A GELU of the tanh form."""
        if node.target is not torch.ops.aten.gelu.default:
            return None
        if node.kwargs.get("approximate", "none") != "tanh":
            return NearMiss("the exact form has no faster kernel")
        return node.args[0]  # type: ignore[return-value]

    def rewrite(self, graph: fx.Graph, node: fx.Node, match: fx.Node) -> fx.Node:
        """One `stepfold::fast_gelu`."""
        return graph.call_function(torch.ops.stepfold.fast_gelu.default, (match,))
