"""Nodes that return what they receive: removed, so that patterns and engines do not trip over them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.rewriting import Refused, Rewrite, is_tensor, shape_of

aten = torch.ops.aten
OPEN_END = 1 << 62  # slices without an end carry a huge one


def _always(node: fx.Node) -> str:
    return ""


def _evaluation(node: fx.Node) -> str:
    return "dropout in training mode" if node.args[2] else ""


def _full_range(node: fx.Node) -> str:
    """Equal sizes at the probe batches prove a full range, except along the batch itself."""
    _, dimension, _, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    if step not in (None, 1):
        return "it takes every n-th element"
    if shape_of(node)[dimension or 0] is not None:  # type: ignore[index]
        return ""
    if end is None or (isinstance(end, int) and end >= OPEN_END):
        return ""
    if isinstance(end, fx.Node) and end.target is aten.sym_size.int:
        return ""
    return "its end is a number along the batch"


def _identity_order(node: fx.Node) -> str:
    rank = len(shape_of(node))
    order = [dimension % rank for dimension in node.args[1]]  # type: ignore[union-attr]
    return "" if order == list(range(rank)) else "it reorders dimensions"


def _neutral(element: int) -> Callable[[fx.Node], str]:
    def check(node: fx.Node) -> str:
        other: Any = node.args[1]
        scalar = isinstance(other, int | float) and not isinstance(other, bool)
        return "" if scalar and other == element else f"its second argument is not {element}"

    return check


CHECKS: dict[Any, Callable[[fx.Node], str]] = {
    aten.clone.default: _always,
    aten.contiguous.default: _always,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.detach_.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.to.dtype: _always,
    aten.to.dtype_layout: _always,
    aten.to.device: _always,
    aten.to.other: _always,
    aten._to_copy.default: _always,
    aten.type_as.default: _always,
    aten.dropout.default: _evaluation,
    aten.expand.default: _always,
    aten.repeat.default: _always,
    aten.reshape.default: _always,
    aten.view.default: _always,
    aten.pad.default: _always,
    aten.constant_pad_nd.default: _always,
    aten.permute.default: _identity_order,
    aten.slice.Tensor: _full_range,
    aten.mul.Tensor: _neutral(1),
    aten.mul.Scalar: _neutral(1),
    aten.div.Tensor: _neutral(1),
    aten.div.Scalar: _neutral(1),
    aten.add.Tensor: _neutral(0),
    aten.add.Scalar: _neutral(0),
    aten.sub.Tensor: _neutral(0),
    aten.sub.Scalar: _neutral(0),
}
"""For each operator the condition, beyond equal shape and dtype, under which it is the identity; "" means it holds."""


class NoOp(Rewrite[fx.Node]):
    """f(x, ...) -> x where the arguments make f the identity.

    - copies, views of the same tensor, dropout in evaluation mode;
    - casts to the same dtype, expansion, reshape, permutation and padding to the same shape;
    - slices over the full range;
    - multiplication and division by 1, addition and subtraction of 0 (of -0.0 the sign is lost).
    """

    name: ClassVar[str] = "no-op"
    roots: ClassVar[Collection[Any]] = CHECKS.keys()

    def match(self, node: fx.Node) -> fx.Node | Refused:
        """The input the node equals."""
        source = node.args[0]
        if not is_tensor(source):
            return Refused("its input is not one tensor")
        assert isinstance(source, fx.Node)
        if source.meta["val"].dtype != node.meta["val"].dtype:
            return Refused("it changes the dtype")
        if shape_of(source) != shape_of(node):
            return Refused("it changes the shape")
        reason = CHECKS[node.target](node)
        return Refused(reason) if reason else source

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: fx.Node) -> fx.Node:
        """The input itself."""
        return match
