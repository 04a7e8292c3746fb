"""Squeezes of dimensions that are not 1: PyTorch ignores them, ONNX refuses them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.rewriting import Refused, Rewrite, is_tensor, shape_of

aten = torch.ops.aten


class NoOpSqueeze(Rewrite[fx.Node]):
    """squeeze(x, d) -> x where no dimension in d has size 1.

    PixArt squeezes the width of its modulation that way; export reports success and engines refuse the model.
    """

    name: ClassVar[str] = "no-op-squeeze"
    roots: ClassVar[Collection[Any]] = frozenset({aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default})

    def match(self, node: fx.Node) -> fx.Node | Refused:
        """The input the squeeze equals."""
        source = node.args[0]
        if not is_tensor(source):
            return Refused("its input is not one tensor")
        assert isinstance(source, fx.Node)
        if len(shape_of(source)) != len(shape_of(node)):
            return Refused("it removes a dimension of size 1")
        return source

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: fx.Node) -> fx.Node:
        """The input itself."""
        return match
