"""What a fusion rule is: a pattern with bindings, a check that answers with a reason, a rewrite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from torch import fx

from ...ir.edit import drop_dead_code
from ...ir.program import Refusal
from ..marks import mark

MatchT = TypeVar("MatchT")


@dataclass(frozen=True)
class NearMiss:
    """The pattern began here but does not hold, and why."""

    reason: str


class Rule(ABC, Generic[MatchT]):
    """One rewrite. The first line of its docstring is the equation."""

    name: ClassVar[str]

    @abstractmethod
    def match(self, node: fx.Node) -> MatchT | NearMiss | None:
        """What the pattern that ends in `node` binds, why it nearly holds, or None when it does not begin."""

    @abstractmethod
    def rewrite(self, graph: fx.Graph, node: fx.Node, match: MatchT) -> fx.Node:
        """Insert the replacement before `node` and return it; dead code goes on its own."""


def apply_rule(graph: fx.GraphModule, rule: Rule[MatchT]) -> tuple[int, list[Refusal]]:
    """Rewrite every match in place; returns how many, and the near misses."""
    changed, refused = 0, []
    for node in list(graph.graph.nodes):
        match = rule.match(node)
        if match is None:
            continue
        if isinstance(match, NearMiss):
            refused.append(Refusal(f"{rule.name}: {node.name}", match.reason))
            continue
        with graph.graph.inserting_before(node):
            replacement = rule.rewrite(graph.graph, node, match)
        replacement.meta.update(node.meta)
        mark(replacement, "fuse", rule.name)
        node.replace_all_uses_with(replacement)
        changed += 1
    drop_dead_code(graph.graph)  # it would count as a reader for the rules that follow
    return changed, refused


def two(node: fx.Node, target: object) -> list[tuple[fx.Node, fx.Node]]:
    """The two values that `node` puts together, in both orders; none where it is another operator or has a number."""
    if node.target is not target or node.kwargs or not all(isinstance(value, fx.Node) for value in node.args):
        return []
    first, second = node.args
    return [(first, second), (second, first)]  # type: ignore[list-item]
