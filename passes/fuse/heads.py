"""Values of heads, [B, H, T, K], written with their tokens first, [B, T, H, K], as before they were transposed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ..marks import key_of

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
ROTARY = torch.ops.stepfold.rotary.default
KEPT = ("nn_module_stack", "stack_trace", key_of("fuse"))  # metadata of a value that its other form has too
TOKENS = 2  # the dimension of tokens in [B, H, T, K]


def swapped(node: fx.Node) -> fx.Node | None:
    """What `node` swaps tokens and heads of, [B, T, H, K] <-> [B, H, T, K]; None when it does something else."""
    swaps = node.target is aten.transpose.int and {int(d) % 4 for d in node.args[1:]} == {1, 2}  # type: ignore[arg-type]
    swaps |= node.target is aten.permute.default and [d % 4 for d in node.args[1]] == [0, 2, 1, 3]  # type: ignore[union-attr]
    if not swaps or len(node.meta["shape"]) != 4:
        return None
    return skip_copies(node.args[0])


def skip_copies(node: object) -> fx.Node:
    """What copies lead back to."""
    assert isinstance(node, fx.Node)
    while node.target is aten.clone.default:
        (node, *_) = node.all_input_nodes
    return node


@dataclass
class TokensFirst:
    """Rewrites what is computed after a transpose to heads into the same in front of it.

    Norms and rotary embeddings of each head, joins of tokens and parts of them are the same in both orders.

    Attributes:
        reader: reads what is rewritten; whatever else reads a part of it would have it computed twice.
    """

    reader: fx.Node
    passed: dict[fx.Node, fx.Node | None] = field(default_factory=dict)

    def possible(self, *values: fx.Node) -> bool:
        """Whether all that lies between transposes and the values can be rewritten, and nothing else reads it."""
        if not all(self._reach(value) for value in values):
            return False
        own = {*self.passed, self.reader}
        return all(own.issuperset(node.users) for node in self.passed)

    def write(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """The value as [B, T, H, K], at the insertion point of the graph."""
        value = skip_copies(value)
        split = swapped(value)
        if split is not None:
            return split
        written = self.passed[value]
        if written is None:
            written = graph.node_copy(value, lambda node: self.write(graph, node) if node in _moved(value) else node)
            written.meta = {key: value.meta[key] for key in KEPT if key in value.meta}
            _turn(written)
            self.passed[value] = written
        return written

    def _reach(self, value: fx.Node) -> bool:
        """Whether `value` is made of transposed ones; notes what it passes on the way."""
        while value.target is aten.clone.default:
            self.passed[value] = None
            (value, *_) = value.all_input_nodes
        if swapped(value) is not None:
            return True
        self.passed[value] = None
        sources = _moved(value)
        return bool(sources) and all(self._reach(source) for source in sources)


def _moved(node: fx.Node) -> list[fx.Node]:
    """What an operator reads as [B, H, T, K] and could as well as [B, T, H, K]; nothing where it could not."""
    if len(node.meta.get("shape", ())) != 4:
        return []
    if node.target in NORMS and len(node.args[1]) == 1:  # type: ignore[arg-type]
        return [node.args[0]]  # type: ignore[list-item]
    if node.target is ROTARY and node.args[3]:
        return [node.args[0]]  # type: ignore[list-item]
    if node.target is aten.slice.Tensor and node.args[1:2] in ((TOKENS,), (TOKENS - 4,)):
        return [node.args[0]]  # type: ignore[list-item]
    if node.target is aten.cat.default and node.args[1:] in ((TOKENS,), (TOKENS - 4,)):
        return list(node.args[0])  # type: ignore[arg-type]
    return []


def _turn(node: fx.Node) -> None:
    """Change the arguments that name the dimension of tokens."""
    if node.target is ROTARY:
        node.update_arg(3, False)
    elif node.target not in NORMS:
        node.update_arg(1, 1)
