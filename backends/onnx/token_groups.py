"""Dynamic quantization by groups of a token's features, instead of one scale for a whole batch.

Engines whose integer kernels quantize float activations by themselves take a scale for each token, or for each group
of its features: finer than the one scale of `stepfold::quantize_dynamic`, and samples of a batch do not feel each
other. The stage that such an engine computes is written down here, so that it runs in PyTorch too.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ...ir.edit import copy_graph, finish
from ...ir.program import Stage

QUANTIZE = torch.ops.stepfold.quantize_dynamic.default
QLINEAR = torch.ops.stepfold.qlinear.default
GROUP_QLINEAR = torch.ops.stepfold.group_qlinear.default


def dynamic_widths(stage: Stage) -> list[int]:
    """In features M of every integer layer whose activations are quantized when it runs."""
    return [node.args[3].meta["val"].shape[0] for node in stage.graph.graph.nodes if _source(node) is not None]


def group_size(widths: Sequence[int], step: int, largest: int) -> int:
    """The features that share a scale: one number for all layers of a stage.

    Large groups are fast, and those that end where a layer ends are faster still, so this is the largest one of those
    that divide most layers.

    Args:
        widths: widths of the layers, in features.
        step: number of which the engine takes multiples.
        largest: largest group to be considered; the error grows with the group.
    """
    limit = min(largest, max(step, min(widths)))
    sizes = range(step, limit + 1, step)
    counts = Counter({size: sum(width % size == 0 for width in widths) for size in sizes})
    return max(sizes, key=lambda size: (counts[size], size))


def by_token_groups(stage: Stage, group: int) -> Stage:
    """The stage with each pair of `quantize_dynamic` and `qlinear` as one `group_qlinear`."""
    graph = copy_graph(stage)
    for node in list(graph.graph.nodes):
        source = _source(node)
        if source is None:
            continue
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(GROUP_QLINEAR, (source, *node.args[3:6], group))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    return finish(stage, graph)


def _source(node: fx.Node) -> fx.Node | None:
    """What an integer layer with dynamic activations reads before it is quantized; None for any other node."""
    if node.target is not QLINEAR:
        return None
    quantized = node.args[0]
    assert isinstance(quantized, fx.Node)
    triple = quantized.args[0] if quantized.target is operator.getitem else None
    if not isinstance(triple, fx.Node) or triple.target is not QUANTIZE:
        return None
    return triple.args[0]  # type: ignore[return-value]
