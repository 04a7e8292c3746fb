"""Remove blocks: what passes through a block skips it, and what only it read is no longer computed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import fx

from .cut import enclosed
from .edit import copy_graph, drop_dead_code, finish, output_nodes
from .program import Program, Refusal, Slot, Stage
from .shapes import follows_batch

aten = torch.ops.aten


def remove_blocks(program: Program, blocks: Collection[Collection[fx.Node]]) -> Program | Refusal:
    """The program without some blocks of its step stage: each adds nothing to the values that pass through it.

    Args:
        program: program whose one computing slot has one variant.
        blocks: nodes of each block.

    Returns:
        The smaller program, or why a block cannot be removed.
    """
    stage = program.step
    graph = copy_graph(stage)
    twins = dict(zip(stage.graph.graph.nodes, graph.graph.nodes, strict=True))
    replaced: dict[fx.Node, fx.Node] = {}
    for block in blocks:
        passing = _passing(stage, block)
        if isinstance(passing, Refusal):
            return passing
        replaced |= passing
    for result in replaced:
        source = result
        while source in replaced:
            source = replaced[source]
        twins[result].replace_all_uses_with(twins[source])
    drop_dead_code(graph.graph)
    return drop_unread(program.with_stage(finish(stage, graph)))


def drop_unread(program: Program) -> Program:
    """The program without outputs and tables that no stage reads."""
    slots: list[Slot] = []
    read = set(program.outputs)
    for slot in reversed(program.slots):
        stages = [_returning(stage, read) for stage in slot.variants]
        if stages[0].outputs:
            slots.append(replace(slot, variants=tuple(stages)))
            read |= {port.name for stage in stages for port in stage.inputs}
    tables = {name: table for name, table in program.tables.items() if name in read}
    return replace(program, slots=tuple(reversed(slots)), tables=tables)


def _returning(stage: Stage, read: Collection[str]) -> Stage:
    """The stage with those of its outputs alone that are read."""
    kept = [i for i, port in enumerate(stage.outputs) if port.name in read]
    if len(kept) == len(stage.outputs):
        return stage
    outputs = tuple(stage.outputs[i] for i in kept)
    if not kept:
        return replace(stage, outputs=())
    graph = copy_graph(stage)
    output = graph.graph.output_node()
    output.args = (tuple(output.args[0][i] for i in kept),)  # type: ignore[index]
    return finish(replace(stage, outputs=outputs), graph)


def _passing(stage: Stage, block: Collection[fx.Node]) -> dict[fx.Node, fx.Node] | Refusal:
    """Each value that others read of a block, and the value that the block added to."""
    inside = enclosed(list(stage.graph.graph.nodes), block)
    found: dict[fx.Node, fx.Node] = {}
    for node in stage.graph.graph.nodes:
        if node not in inside or all(user in inside for user in node.users):
            continue
        if not follows_batch(node):
            continue  # sizes and masks of a fixed shape, which are computed again where they are read
        source = None if node in output_nodes(stage) else _stream(node, inside)
        if source is None:
            return Refusal(node.name, "what the block returns is no sum of what it reads: other shapes, or an output")
        found[node] = source
    return found


def _stream(value: fx.Node, inside: Collection[fx.Node]) -> fx.Node | None:
    """The value outside of a block that a value of it carries on by sums alone."""
    stack, seen = [value], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node not in inside:
            if (node.meta["shape"], node.meta["val"].dtype) == (value.meta["shape"], value.meta["val"].dtype):
                return node
        elif node not in seen and node.target is aten.add.Tensor:
            stack += node.all_input_nodes
        seen.add(node)
    return None
