"""Cut the step slot of a program at the borders of ranges of blocks, exactly.

What lies before the first range is computed by `step.head`, each range by a body, and what follows by `step.tail`. A
body returns what it *adds* to the values that pass through it, where it returns values of the shape that it reads: a
body that is skipped can then be replaced by what it added at earlier evaluations (the block caches of DeepCache, FORA
and TaylorSeer store this). Weights are shared with the program that was cut.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from .analysis.rates import read_values
from .analysis.sites.walk import constant_values
from .edit import copy_graph, extract, finish, replace_by_inputs
from .names import module_path
from .program import Program, Refusal, Slot, Stage
from .shapes import follows_batch

aten = torch.ops.aten
Segments = Mapping[str, int]
"""Name of a node -> the piece that computes it: even numbers lie between the bodies, odd ones are bodies."""


def cut(program: Program, bodies: Sequence[Collection[fx.Node]]) -> Program | Refusal:
    """The program with its step slot cut into `step.head`, bodies, what lies between them, and `step.tail`.

    Args:
        program: program whose one computing slot has one variant.
        bodies: nodes of each body, in the order in which they run; what lies between nodes of a body belongs to it.

    Returns:
        The cut program, or why it cannot be cut.
    """
    (slot,), rest = program.computing, program.step
    segments = _segments(rest, bodies)
    if isinstance(segments, Refusal):
        return segments
    names, pieces = _names(slot.name, len(bodies)), list[Slot]()
    for number, name in enumerate(names[:-1]):
        if number % 2:
            rest, segments = _adding(rest, segments, number)
        values = _crossing(rest, segments, number)
        if not values:
            continue  # nothing lies between two bodies, or before the first
        ports = [f"{name}.{node.name}" for node in values]
        pieces.append(Slot.of(extract(rest, name, slot.rate, values, ports)))
        rest = replace_by_inputs(rest, values, ports)
    pieces.append(Slot.of(replace(rest, name=names[-1])))
    slots = [piece for known in program.slots for piece in (pieces if known is slot else [known])]
    return replace(program, slots=tuple(slots))


def _names(base: str, bodies: int) -> list[str]:
    """The names of all pieces in order."""
    middle = [("body", "between")[i % 2] for i in range(2 * bodies - 1)]
    numbered = middle if bodies == 1 else [f"{name}_{i // 2 + 1}" for i, name in enumerate(middle)]
    return [f"{base}.{name}" for name in ("head", *numbered, "tail")]


def _segments(stage: Stage, bodies: Sequence[Collection[fx.Node]]) -> Segments | Refusal:
    """The piece of each node: as late as what reads it allows, so that little crosses the borders."""
    nodes = list(stage.graph.graph.nodes)
    own = {node: 2 * i + 1 for i, body in enumerate(bodies) for node in enclosed(nodes, body)}
    found: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        readers = [found[user] for user in node.users]
        latest = min(readers, default=2 * len(bodies))
        if node not in own:
            found[node] = latest - latest % 2
        elif latest < own[node]:
            reader = next(user for user in node.users if found[user] == latest)
            return Refusal(module_path(node), f"a body that comes before it reads it: {module_path(reader)}")
        else:
            found[node] = own[node]
    for node in nodes:
        late = [source for source in read_values(node) if found[source] > found[node]]
        if late:
            return Refusal(module_path(node), f"it reads what a later piece computes: {module_path(late[0])}")
    return {node.name: number for node, number in found.items()}


def enclosed(nodes: Sequence[fx.Node], body: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes of a body, and what lies on a way from one of them to another."""
    after, before = set[fx.Node](body), set[fx.Node](body)
    for node in nodes:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    for node in reversed(nodes):
        if any(user in before for user in node.users):
            before.add(node)
    return after & before


def _crossing(stage: Stage, segments: Segments, number: int) -> list[fx.Node]:
    """What later pieces read of this one, as far downstream as it has the batch in front; the rest they compute too.

    Constants are computed wherever they are read.
    """
    nodes = list(stage.graph.graph.nodes)
    constant, frontier = constant_values(stage.graph.graph), set[fx.Node]()
    inner = {node for node in nodes if node.op == "call_function" and segments[node.name] <= number}
    stack = [source for node in nodes if node not in inner for source in node.all_input_nodes if source in inner]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if follows_batch(node) and node not in constant:
            frontier.add(node)
            continue
        fresh = [source for source in read_values(node) if source in inner and source not in seen]
        seen.update(fresh)
        stack += fresh
    return [node for node in nodes if node in frontier]


def _adding(stage: Stage, segments: Segments, number: int) -> tuple[Stage, Segments]:
    """The stage whose body computes what it adds to the values that it reads, and whose later pieces add that again."""
    graph, found = copy_graph(stage), dict(segments)
    twins = dict(zip(stage.graph.graph.nodes, graph.graph.nodes, strict=True))
    for value in _crossing(stage, segments, number):
        source = _stream(value, segments, number)
        if source is None:
            continue
        result, before = twins[value], twins[source]
        later = [user for user in result.users if segments[user.name] > number]
        with graph.graph.inserting_after(result):
            added = graph.graph.call_function(aten.sub.Tensor, (result, before))
        with graph.graph.inserting_after(added):
            again = graph.graph.call_function(aten.add.Tensor, (before, added))
        for user in later:
            user.replace_input_with(result, again)
        found |= {added.name: number, again.name: number + 1}
    return finish(stage, graph), found


def _stream(value: fx.Node, segments: Segments, number: int) -> fx.Node | None:
    """The input of a body that a value of it carries on: by sums alone, or the only one of its shape."""
    alike = [
        node
        for node in value.graph.find_nodes(op="placeholder")
        if (node.meta["shape"], node.meta["val"].dtype) == (value.meta["shape"], value.meta["val"].dtype)
        and any(segments[user.name] == number for user in node.users)
    ]
    stack, seen = [value], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in alike:
            return node
        if node not in seen and node.target is aten.add.Tensor and segments[node.name] == number:
            stack += node.all_input_nodes
        seen.add(node)
    return alike[0] if len(alike) == 1 else None
