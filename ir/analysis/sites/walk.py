"""Walking a graph from a value to where it comes from, through operators of some kind only."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

LINEAR = aten.linear.default
LAYOUT = frozenset(
    {
        operator.getitem,
        aten._unsafe_view.default,
        aten.alias.default,
        aten.cat.default,
        aten.chunk.default,
        aten.copy.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.flip.default,
        aten.movedim.int,
        aten.narrow.default,
        aten.permute.default,
        aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default,
        aten.repeat_interleave.self_int,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.slice_scatter.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.stack.default,
        aten.t.default,
        aten.to.dtype,
        aten._to_copy.default,
        aten.transpose.int,
        aten.unbind.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
"""Operators that only choose, rearrange or cast elements; `rearranges` says it of a node."""

NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default})
ELEMENTWISE = frozenset(
    {
        aten.add.Tensor,
        aten.add.Scalar,
        aten.clamp.default,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.rsqrt.default,
        aten.sub.Tensor,
    }
)
ACTIVATIONS = frozenset(
    {
        aten.elu.default,
        aten.erf.default,
        aten.gelu.default,
        aten.hardswish.default,
        aten.leaky_relu.default,
        aten.mish.default,
        aten.relu.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.softplus.default,
        aten.tanh.default,
    }
)


def rearranges(node: fx.Node) -> bool:
    """Whether a node only chooses, rearranges or casts elements; `einsum` does when it only orders dimensions."""
    if node.target is not aten.einsum.default:
        return node.target in LAYOUT
    read, _, written = str(node.args[0]).replace(" ", "").partition("->")
    return "," not in read and len(set(read)) == len(read) and sorted(read) == sorted(written)


@dataclass
class Cone:
    """What lies between a value and its sources.

    Attributes:
        inner: nodes passed through.
        sources: the first nodes that were not passed through, constants left out.
    """

    inner: set[fx.Node] = field(default_factory=set)
    sources: list[fx.Node] = field(default_factory=list)


def cone(value: Any, through: Collection[Any], constants: Collection[fx.Node]) -> Cone:
    """Walk back from a value through the given operators; values without inputs of the stage are not sources."""
    found = Cone()
    stack = [value]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in found.inner or node in found.sources or node in constants:
            continue
        if node.op == "call_function" and node.target in through:
            found.inner.add(node)
            stack.extend(source for source in node.all_input_nodes if not is_size(source))
        else:
            found.sources.append(node)
    return found


def readers(node: fx.Node, through: Collection[Any]) -> tuple[list[fx.Node], set[fx.Node]]:
    """The first readers of a node after operators of the given kind, and the nodes passed through."""
    found: list[fx.Node] = []
    passed: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in passed or user in found:
            continue
        if user.op == "call_function" and user.target in through:
            passed.add(user)
            stack.extend(user.users)
        else:
            found.append(user)
    return found, passed


def constant_values(graph: fx.Graph) -> set[fx.Node]:
    """Weights and everything computed from weights alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number, such as the size of the batch."""
    return not isinstance(node.meta.get("val"), torch.Tensor | list | tuple)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module a node was called in; empty at the top level."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def described(node: fx.Node) -> str:
    """What a node is, for a message."""
    return f"input {node.name}" if node.op == "placeholder" else str(node.target).removesuffix(".default")


Ordered = Callable[[Iterable[fx.Node]], tuple[fx.Node, ...]]


def sorter(graph: fx.Graph) -> Ordered:
    """A function that brings nodes into graph order."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    return lambda nodes: tuple(sorted(set(nodes), key=position.__getitem__))
