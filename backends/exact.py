"""Layers whose 8-bit codes saturate without VNNI, in forms that every processor computes exactly.

The schemes of `quantize` make codes that do not (see `stepfold.ir.pairs`); codes of a checkpoint or of another quantizer
may. An engine that multiplies integers on the CPU takes one of these forms for such layers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ..ir.edit import add_buffer, copy_graph, finish
from ..ir.operators.qlinear import UNSIGNED_ZERO
from ..ir.pairs import saturates
from ..ir.program import Stage, attribute

QLINEAR = torch.ops.stepfold.qlinear.default
WEIGHT, BIAS = 3, 5  # arguments of a qlinear


def saturating_layers(stage: Stage) -> list[fx.Node]:
    """The integer layers of a stage whose stored codes saturate."""
    nodes: Sequence[fx.Node] = stage.graph.graph.find_nodes(op="call_function", target=QLINEAR)
    verdicts: dict[str, bool] = {}
    found = []
    for node in nodes:
        name = str(node.args[WEIGHT].target)  # type: ignore[union-attr]
        if name not in verdicts:
            codes = attribute(stage.graph, name)
            verdicts[name] = codes.dtype is torch.int8 and saturates(codes.T)
        found += [node] if verdicts[name] else []
    return found


def with_unsigned_weights(stage: Stage) -> Stage:
    """Give saturating layers on unsigned activations unsigned weights: u8 x u8 is multiplied in 32 bits everywhere.

    Layers on signed activations stay as they are, for engines that multiply s8 x s8 in 32 bits too.
    """
    rewrite = _Rewrite(stage)
    for node in rewrite.layers:
        if node.args[0].meta["val"].dtype is torch.uint8:  # type: ignore[union-attr]
            rewrite.give(node, "unsigned", (rewrite.codes(node) + UNSIGNED_ZERO).to(torch.uint8))
    return rewrite.stage()


def in_two_layers(stage: Stage) -> Stage:
    """Write saturating layers as two whose codes add up: halves are at most 64, and so are pairs of them at most 128."""
    rewrite = _Rewrite(stage)
    graph = rewrite.graph.graph
    for node in rewrite.layers:
        codes = rewrite.codes(node)
        half = codes // 2
        with graph.inserting_after(node):
            second = graph.call_function(QLINEAR, (*node.args[:BIAS], None))
        with graph.inserting_after(second):
            total = graph.call_function(torch.ops.aten.add.Tensor, (node, second))
        second.meta, total.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
        rewrite.give(node, "first_half", half.to(torch.int8))
        rewrite.give(second, "second_half", (codes - half).to(torch.int8))
    return rewrite.stage()


class _Rewrite:
    """A copy of a stage's graph in which saturating layers get other codes.

    Attributes:
        graph: the copy.
        layers: the layers in it that saturate.
    """

    def __init__(self, stage: Stage):
        self._stage = stage
        self._given: dict[str, str] = {}
        self.graph = copy_graph(stage)
        twins = dict(zip(stage.graph.graph.nodes, self.graph.graph.nodes, strict=True))
        self.layers = [twins[node] for node in saturating_layers(stage)]

    def codes(self, node: fx.Node) -> torch.Tensor:
        """The codes [M, N] int16 that a layer has in the stage."""
        return attribute(self._stage.graph, str(node.args[WEIGHT].target)).to(torch.int16)  # type: ignore[union-attr]

    def give(self, node: fx.Node, label: str, codes: torch.Tensor) -> None:
        """Let a layer read other codes; layers that shared theirs share these, so that engines still find equal ones."""
        name = f"{node.args[WEIGHT].target}_{label}"  # type: ignore[union-attr]
        if name not in self._given:
            self._given[name] = add_buffer(self.graph, name, codes)
        with self.graph.graph.inserting_before(node):
            node.update_arg(WEIGHT, self.graph.graph.get_attr(self._given[name]))

    def stage(self) -> Stage:
        """The stage with the copy; the one that was given where no layer saturates."""
        return finish(self._stage, self.graph) if self.layers else self._stage
