"""FLOPs and bytes of a graph, counted on the shapes of its nodes (a multiply-add counts two)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import fx

from .operators import RECORDS
from .program import Program, Slot, Stage
from .shapes import PROBE_BATCHES

aten = torch.ops.aten


def flops(node: fx.Node) -> int:
    """FLOPs of one node at the probe batch; only operators that multiply matrices count."""
    formula = _formula(node)
    return formula(node) if formula else 0


def stage_flops(stage: Stage) -> int:
    """FLOPs of one stage for one sample."""
    return sum(flops(node) for node in stage.graph.graph.nodes) // PROBE_BATCHES[0]


def program_flops(program: Program) -> int:
    """FLOPs of one evaluation for one sample, on average over the calls of the loop."""
    return sum(_slot_flops(slot) for slot in program.computing)


def _slot_flops(slot: Slot) -> int:
    counted = [stage_flops(stage) for stage in slot.variants]
    numbers = slot.by_call or (0,)
    return sum(counted[number] for number in numbers) // len(numbers)


def program_depth(program: Program) -> int:
    """Matrix products on the longest chain of one evaluation: those of the computing slots follow each other."""
    longest = [max(map(stage_depth, slot.variants)) for slot in program.slots]
    computing = [depth for slot, depth in zip(program.slots, longest, strict=True) if slot in program.computing]
    return max([sum(computing), *longest])


def stage_depth(stage: Stage) -> int:
    """Matrix products on the longest chain from an input to an output."""
    longest: dict[fx.Node, int] = {}
    for node in stage.graph.graph.nodes:
        before = max((longest[source] for source in node.all_input_nodes), default=0)
        longest[node] = before + (_formula(node) is not None)
    return max(longest.values(), default=0)


def _formula(node: fx.Node) -> Callable[[fx.Node], int] | None:
    record = RECORDS.get(node.target)
    return FORMULAS.get(node.target) if record is None else record.flops


def _shape(value: object) -> torch.Size:
    assert isinstance(value, fx.Node)
    return value.meta["val"].shape


def _linear(node: fx.Node) -> int:
    return 2 * prod(node.meta["val"].shape) * _shape(node.args[1])[-1]


def _matmul(node: fx.Node) -> int:
    return 2 * prod(node.meta["val"].shape) * _shape(node.args[0])[-1]


def _addmm(node: fx.Node) -> int:
    return 2 * prod(node.meta["val"].shape) * _shape(node.args[1])[-1]


def _convolution(node: fx.Node) -> int:
    return 2 * prod(node.meta["val"].shape) * prod(_shape(node.args[1])[1:])


def _transposed_convolution(node: fx.Node) -> int:
    return 2 * prod(_shape(node.args[0])) * prod(_shape(node.args[1])[1:])


def _attention(node: fx.Node) -> int:
    query, key, value = (_shape(argument) for argument in node.args[:3])
    return 2 * prod(query) * key[-2] + 2 * prod(query[:-1]) * prod(value[-2:])


FORMULAS: dict[object, Callable[[fx.Node], int]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv_transpose1d.default: _transposed_convolution,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.conv_transpose3d.input: _transposed_convolution,
    aten.scaled_dot_product_attention.default: _attention,
}
"""FLOPs by ATen operator; those of stepfold bring theirs (`stepfold.ir.operators`)."""
