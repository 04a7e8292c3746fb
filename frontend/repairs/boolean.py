"""Selections between booleans: ONNX Runtime has no Where on bool."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.rewriting import Refused, Rewrite, call, is_tensor

aten = torch.ops.aten


class BooleanMaskedFill(Rewrite[bool]):
    """masked_fill(x, m, true) -> x or m;  masked_fill(x, m, false) -> x and not m, for boolean x."""

    name: ClassVar[str] = "boolean-masked-fill"
    roots: ClassVar[Collection[Any]] = frozenset({aten.masked_fill.Scalar})

    def match(self, node: fx.Node) -> bool | Refused:
        """The value that is filled in."""
        if not _is_boolean(node.args[0]):
            return Refused("it fills a tensor that is not boolean")
        return bool(node.args[2])

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: bool) -> fx.Node:
        """The logical operator."""
        values, mask = node.args[0], node.args[1]
        if match:
            return call(graph, node, aten.logical_or.default, values, mask)
        return call(graph, node, aten.logical_and.default, values, call(graph, node, aten.logical_not.default, mask))


@dataclass(frozen=True)
class _Branches:
    condition: fx.Node
    chosen: Any
    other: Any


class BooleanWhere(Rewrite[_Branches]):
    """where(c, a, b) -> (c and a) or (not c and b), for boolean a and b."""

    name: ClassVar[str] = "boolean-where"
    roots: ClassVar[Collection[Any]] = frozenset({aten.where.self})

    def match(self, node: fx.Node) -> _Branches | Refused:
        """Condition and both branches."""
        condition, chosen, other = node.args
        if not (_is_boolean(chosen) and _is_boolean(other)):
            return Refused("its branches are not boolean")
        assert isinstance(condition, fx.Node)
        return _Branches(condition, chosen, other)

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: _Branches) -> fx.Node:
        """The disjunction of both branches."""
        where = call(graph, node, aten.logical_and.default, match.condition, match.chosen)
        negated = call(graph, node, aten.logical_not.default, match.condition)
        elsewhere = call(graph, node, aten.logical_and.default, negated, match.other)
        return call(graph, node, aten.logical_or.default, where, elsewhere)


def _is_boolean(argument: Any) -> bool:
    return is_tensor(argument) and argument.meta["val"].dtype == torch.bool
