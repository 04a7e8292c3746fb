"""Rates by dataflow: from the roles of the inputs to how often every value changes.

An argument that is read for its shape or dtype only does not make a value change: `sym_size`, `zeros_like(x)` and
`type_as(_, x)` do not depend on x.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ...loop.ports import Rate
from ...loop.spec import Role
from ..program import Program, Stage

aten = torch.ops.aten

SHAPE_ONLY: dict[object, tuple[int, ...]] = {
    aten.sym_size.int: (0,),
    aten.sym_numel.default: (0,),
    aten.type_as.default: (1,),
    aten.expand_as.default: (1,),
    aten.view_as.default: (1,),
    aten.new_zeros.default: (0,),
    aten.new_ones.default: (0,),
    aten.new_full.default: (0,),
    aten.new_empty.default: (0,),
    aten.zeros_like.default: (0,),
    aten.ones_like.default: (0,),
    aten.full_like.default: (0,),
    aten.empty_like.default: (0,),
}
"""For each operator the positions of arguments whose values it does not read."""

Roles = frozenset[Role]


def input_roles(program: Program) -> dict[str, Roles]:
    """The roles every named value of the program depends on: inputs, tables and stage outputs."""
    constant: Roles = frozenset({"constant"})
    roles = {i.name: Roles({i.role}) - constant for i in program.inputs}
    roles |= {name: frozenset({"timestep"}) for name in program.tables}
    for stage in program.stages:
        by_node = node_roles(stage, roles)
        outputs: Iterable[fx.Node] = stage.graph.graph.output_node().args[0]  # type: ignore[assignment]
        roles |= {port.name: by_node[node] for port, node in zip(stage.outputs, outputs, strict=True)}
    return roles


def node_roles(stage: Stage, inputs: dict[str, Roles]) -> dict[fx.Node, Roles]:
    """For each node of a stage the roles its value depends on; empty is constant."""
    roles: dict[fx.Node, Roles] = {}
    names = iter(port.name for port in stage.inputs)
    for node in stage.graph.graph.nodes:
        if node.op == "placeholder":
            roles[node] = inputs[next(names)]
        else:
            roles[node] = frozenset[Role]().union(*(roles[source] for source in read_values(node)))
    return roles


def read_values(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node whose values, not only shapes, it reads."""
    ignored = SHAPE_ONLY.get(node.target, ())
    kept = [argument for i, argument in enumerate(node.args) if i not in ignored]
    found: list[fx.Node] = []
    fx.map_arg((kept, node.kwargs), found.append)
    return found


def node_rates(program: Program) -> dict[fx.Node, Rate]:
    """The rate of every node of every stage."""
    inputs = input_roles(program)
    return {node: Rate.of(roles) for stage in program.stages for node, roles in node_roles(stage, inputs).items()}


def parameters_by_rate(program: Program) -> dict[Rate, int]:
    """How many weights are read at each rate, each counted once at the highest rate that reads it.

    Weights after a constant expression count where that expression is read.
    """
    rates = node_rates(program)
    highest: dict[tuple[str, str], Rate] = {}
    sizes: dict[tuple[str, str], int] = {}
    order = list(Rate)
    for stage in program.stages:
        tensors = stage.tensors()
        for node in stage.graph.graph.nodes:
            if node.op != "get_attr":
                continue
            key = (stage.name, str(node.target))
            rate = max((_first_rate(user, rates) for user in node.users), key=order.index, default=Rate.CONST)
            highest[key] = max(highest.get(key, Rate.CONST), rate, key=order.index)
            sizes[key] = tensors[str(node.target)].numel()
    return {rate: sum(sizes[key] for key in sizes if highest[key] is rate) for rate in order}


def _first_rate(node: fx.Node, rates: dict[fx.Node, Rate]) -> Rate:
    """The rate of a reader, looking through constant expressions to what they feed."""
    if rates[node] is not Rate.CONST or not node.users:
        return rates[node]
    return max((_first_rate(user, rates) for user in node.users), key=list(Rate).index)
