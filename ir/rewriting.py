"""What a rewrite is: a pattern that ends in a node, a reason with the node that did not fit, a replacement."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import fx

logger = logging.getLogger(__name__)

MatchT = TypeVar("MatchT")


@dataclass(frozen=True)
class Refused:
    """A pattern that began and does not hold.

    Attributes:
        reason: why it does not.
        at: node that does not fit; None for the one that the pattern ends in.
    """

    reason: str
    at: fx.Node | None = None

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Applied:
    """What a rewrite did to a graph.

    Attributes:
        made: nodes that took the place of others.
        refused: where the pattern began and did not hold, by the node that it would end in.
    """

    made: tuple[fx.Node, ...]
    refused: tuple[tuple[fx.Node, Refused], ...]


class Rewrite(ABC, Generic[MatchT]):
    """One rewrite. The first line of its docstring is the equation.

    Attributes:
        name: name in records.
        roots: operators that the pattern ends in.
    """

    name: ClassVar[str]
    roots: ClassVar[Collection[Any]]

    @abstractmethod
    def match(self, node: fx.Node) -> MatchT | Refused | None:
        """What the pattern that ends in a root binds, why it does not hold, or None where it does not begin."""

    @abstractmethod
    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: MatchT) -> fx.Node:
        """The node that takes the place of `node`; what is inserted comes before it.

        A new node without metadata gets those of `node`.
        """

    def begins(self, graph: fx.GraphModule) -> bool:
        """Whether the pattern begins anywhere in a graph, be it refused or not."""
        return any(self.match(node) is not None for node in self._roots_in(graph))

    def apply(self, graph: fx.GraphModule) -> Applied:
        """Rewrite every match in place. What is dead afterwards stays, and so do the metadata of nodes that were replaced."""
        made, refused = [], []
        for node in self._roots_in(graph):
            match = self.match(node)
            if isinstance(match, Refused):
                refused.append((node, match))
                logger.debug("%s: %s left alone: %s", self.name, node.name, match.reason)
            elif match is not None:
                with graph.graph.inserting_before(node):
                    replacement = self.rewrite(graph, node, match)
                replacement.meta = replacement.meta or dict(node.meta)
                node.replace_all_uses_with(replacement)
                graph.graph.erase_node(node)
                made.append(replacement)
        return Applied(tuple(made), tuple(refused))

    def _roots_in(self, graph: fx.GraphModule) -> list[fx.Node]:
        return [node for node in graph.graph.nodes if node.op == "call_function" and node.target in self.roots]


def two(node: fx.Node, target: object) -> list[tuple[fx.Node, fx.Node]]:
    """The two values that `node` combines, in both orders; none where it is another operator or has a number."""
    if node.target is not target or node.kwargs or not all(isinstance(value, fx.Node) for value in node.args):
        return []
    first, second = node.args
    return [(first, second), (second, first)]  # type: ignore[list-item]


def call(graph: fx.GraphModule, like: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    """Add a call at the insertion point, with the module path and source line of `like` and its own fake value."""
    node = graph.graph.call_function(target, arguments)
    _describe(node, like)
    return node


def _describe(node: fx.Node, like: fx.Node) -> None:
    """Give a new node its fake value, shape and provenance.

    The shape with the batch marked is taken from `like` when the sizes agree; otherwise the final propagation sets it.
    """
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    values = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    with torch.no_grad():
        value = node.target(*values[0], **values[1])  # type: ignore[operator]
    node.meta["val"] = value
    if isinstance(value, torch.Tensor) and value.shape == like.meta["val"].shape:
        node.meta["shape"] = like.meta["shape"]


def shape_of(node: fx.Node) -> tuple[int | None, ...]:
    """Sizes of a tensor node, None where one follows the batch."""
    return node.meta["shape"]


def is_tensor(argument: Any) -> bool:
    """Whether an argument is a node that holds one tensor."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)
