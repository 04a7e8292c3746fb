"""ONNX forms of layers whose weights are a few bits in blocks, and blocks as small as one group of activations."""

from __future__ import annotations

import torch
from torch import fx

from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ...ir.blocked import pack_bits, unpack_bits
from ...ir.edit import add_buffer, copy_graph, finish
from ...ir.program import Stage, attribute

BLOCKED_LINEAR = torch.ops.stepfold.blocked_linear.default
FLOAT_PRODUCTS, INTEGER_PRODUCTS = 1, 4
"""Accuracy levels of MatMulNBits."""


def matmul_nbits(
    x: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    block: int,
    round_activations: bool,
) -> torch.Tensor:
    """`stepfold::blocked_linear` as the contrib operator whose layout it has."""
    return torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        (x, blocks, scales, zero_points, None, bias),
        {
            "K": x.shape[-1],
            "N": blocks.shape[0],
            "bits": bits,
            "block_size": block,
            "accuracy_level": INTEGER_PRODUCTS if round_activations else FLOAT_PRODUCTS,
        },
        dtype=x.dtype,
        shape=(*x.shape[:-1], blocks.shape[0]),
        version=1,
    )


def blocked_layers(stage: Stage) -> list[fx.Node]:
    """Every `blocked_linear` of a stage."""
    return stage.graph.graph.find_nodes(op="call_function", target=BLOCKED_LINEAR)  # type: ignore[return-value]


def block_size(node: fx.Node) -> int:
    """Input channels of a `blocked_linear` that share a scale."""
    return node.args[6]  # type: ignore[return-value]


def rounds(node: fx.Node) -> bool:
    """Whether a `blocked_linear` rounds its activations."""
    return bool(node.args[7])


def in_blocks_of(stage: Stage, group: int) -> Stage:
    """The stage whose layers that round activations have blocks of one size, for engines with one size for all.

    The weights are the same: the parts of a block have its scale. Activations are rounded in the smaller blocks.

    Args:
        stage: the blocks of its layers are multiples of `group`.
        group: input channels that share a scale afterwards.
    """
    graph = copy_graph(stage)
    for node in graph.graph.find_nodes(op="call_function", target=BLOCKED_LINEAR):
        bits = node.args[5]
        if not rounds(node) or block_size(node) == group:
            continue
        parts = block_size(node) // group
        blocks, scales = (attribute(graph, str(item.target)) for item in node.args[1:3])
        changed = {1: blocks.reshape(blocks.shape[0], blocks.shape[1] * parts, -1), 2: _repeated(scales, parts)}
        if node.args[3] is not None:
            zeros = unpack_bits(attribute(graph, str(node.args[3].target)), bits, scales.shape[1])
            changed[3] = pack_bits(_repeated(zeros, parts), bits)
        with graph.graph.inserting_before(node):
            for place, value in changed.items():
                name = add_buffer(graph, f"{node.args[place].target}_of_{group}", value)
                node.update_arg(place, graph.graph.get_attr(name))
        node.update_arg(6, group)
    return finish(stage, graph)


def _repeated(values: torch.Tensor, parts: int) -> torch.Tensor:
    """One value [N, blocks] for each part of a block: [N, blocks * parts]."""
    return values.repeat_interleave(parts, dim=1)
