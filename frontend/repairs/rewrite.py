"""What a repair is: a pattern, a check that answers with facts or a reason, and the replacement."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refused:
    """Why a node that carries the operator of a pattern is left alone."""

    reason: str

    def __bool__(self) -> bool:
        return False


class Rewrite(ABC):
    """One exact rewrite of single nodes.

    `pattern` names the operators a match is rooted at, `check` returns the facts the replacement needs or the reason
    for leaving the node alone, `rewrite` puts the replacement before the node and returns it.
    """

    pattern: Collection[Any]

    @abstractmethod
    def check(self, node: fx.Node) -> Any | Refused:
        """Facts about a node whose operator is in `pattern`, or why it is no match; changes nothing."""

    @abstractmethod
    def rewrite(self, graph: fx.GraphModule, node: fx.Node, facts: Any) -> fx.Node:
        """The node that takes the place of `node`."""

    def apply(self, graph: fx.GraphModule) -> int:
        """Rewrite every match in place; returns how many there were."""
        changed = 0
        for node in list(graph.graph.nodes):
            if node.op != "call_function" or node.target not in self.pattern:
                continue
            facts = self.check(node)
            if isinstance(facts, Refused):
                logger.debug("%s: %s left alone: %s", type(self).__name__, node.name, facts.reason)
                continue
            with graph.graph.inserting_before(node):
                replacement = self.rewrite(graph, node, facts)
            node.replace_all_uses_with(replacement)
            graph.graph.erase_node(node)
            changed += 1
        return changed


def call(graph: fx.GraphModule, like: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    """Add a call at the insertion point, with the module path and source line of `like` and its own fake value."""
    node = graph.graph.call_function(target, arguments)
    describe(node, like)
    return node


def describe(node: fx.Node, like: fx.Node) -> None:
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
