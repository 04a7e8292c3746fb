"""Constant folding: what depends on no input is computed once, here."""

from __future__ import annotations

import hashlib
import logging
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.edit import add_buffer
from ...ir.fake_quantize import FAKE_QUANTIZE
from ...ir.program import attribute

logger = logging.getLogger(__name__)
aten = torch.ops.aten

FOLD_BYTES = 64 << 20  # larger results stay computed
FILLS = frozenset({aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format})
LAYOUTS = frozenset(
    {
        operator.getitem,
        aten.alias.default,
        aten.expand.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unbind.int,
        aten.unsqueeze.default,
    }
)
"""Operators that only choose or rearrange elements."""


def fold_constants(graph: fx.GraphModule) -> int:
    """Replace subgraphs that read no input by buffers, in place; returns how many.

    - computed in the dtype of the graph, so float64 rotary tables keep their precision;
    - a weight that is only rearranged stays as it is, so that it keeps its name; a weight of which only a part is
      read is cut;
    - constant fills and results beyond `FOLD_BYTES` stay;
    - quantized weights stay Q/DQ pairs: folded, they would be float weights that happen to lie on a grid;
    - equal results share one buffer.
    """
    folding = _Folding(graph, constant_nodes(graph.graph))
    folded = 0
    for node in list(graph.graph.nodes):
        if node in folding.constants and any(user not in folding.constants for user in node.users):
            folded += folding.fold(node)
    graph.graph.eliminate_dead_code()
    return folded


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Calls that depend on weights and literals alone and give the same result each time."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if node.target in FAKE_QUANTIZE:
            continue
        if all(source.op == "get_attr" or source in found for source in node.all_input_nodes):
            found.add(node)
    return found


@dataclass
class _Folding:
    graph: fx.GraphModule
    constants: set[fx.Node]
    buffers: dict[str, str] = field(default_factory=dict)

    def fold(self, node: fx.Node) -> int:
        """Fold one constant; where that does not pay, what it is computed from."""
        if node not in self.constants:
            return 0
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or node.target is aten.expand.default or _bytes(value) > FOLD_BYTES:
            return sum(self.fold(source) for source in node.all_input_nodes)
        if not self._pays(node):
            return 0
        name = self._buffer(node)
        with self.graph.graph.inserting_before(node):
            replacement = self.graph.graph.get_attr(name)
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        self.constants.discard(node)
        return 1

    def _pays(self, node: fx.Node) -> bool:
        """Whether something is computed, or a part of a weight is all that is read."""
        root = node
        while root.target in LAYOUTS:
            source = root.args[0]
            assert isinstance(source, fx.Node)
            root = source
        if root.op == "get_attr":
            return len(root.users) == 1 and node.meta["val"].numel() < root.meta["val"].numel()
        return root.target not in FILLS

    def _buffer(self, node: fx.Node) -> str:
        with torch.no_grad():
            value = self._evaluate(node, {}).contiguous().clone()
        digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
        key = digest.hexdigest()
        if key not in self.buffers:
            self.buffers[key] = add_buffer(self.graph, f"folded_{node.name}", value)
        return self.buffers[key]

    def _evaluate(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        if node not in known:
            if node.op == "get_attr":
                known[node] = attribute(self.graph, str(node.target))
            else:
                for source in node.all_input_nodes:
                    self._evaluate(source, known)
                arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda source: known[source])
                known[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
        return known[node]


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


def share_equal_weights(graph: fx.GraphModule) -> int:
    """Let attributes that are one tensor (tied weights) be read under one name; returns how many names went."""
    names: dict[tuple[Any, ...], str] = {}
    shared = 0
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor = attribute(graph, str(node.target))
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        name = names.setdefault(key, str(node.target)) if tensor.numel() else str(node.target)
        if name != node.target:
            node.target = name
            shared += 1
    return shared
