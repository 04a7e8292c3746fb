"""Put realizations into the computing slots of a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from ...calibration.document import bucket_of
from ...ir.edit import copy_graph, finish
from ...ir.program import Program, Stage
from ...loop.ports import Port
from ..marks import mark
from .layers import Group
from .realize import Place, Realization


def replaced(
    program: Program, groups: Sequence[Group], realizations: Sequence[Realization | None], way: str = ""
) -> Program:
    """The program with layers of its computing slots replaced; see `replaced_in`."""
    changed, tables = [], dict[str, torch.Tensor]()
    for stage in program.steps:
        own = [i for i, group in enumerate(groups) if group.source.graph is stage.graph.graph]
        if own:
            made, read = replaced_in(stage, [groups[i] for i in own], [realizations[i] for i in own], way)
            changed.append(made)
            tables |= read
    return _with_tables(program.with_stages(changed), tables)


def replaced_in(
    stage: Stage, groups: Sequence[Group], realizations: Sequence[Realization | None], way: str = ""
) -> tuple[Stage, dict[str, torch.Tensor]]:
    """The stage with layers replaced, and the tables that its new inputs read: name -> [buckets].

    Args:
        stage: stage of the groups.
        groups: layers to replace.
        realizations: what takes the place of each group; None leaves it.
        way: how they are quantized, the mark that their replacements get.
    """
    graph = copy_graph(stage)
    twins = dict(zip(stage.graph.graph.nodes, graph.graph.nodes, strict=True))
    tables: dict[str, torch.Tensor] = {}
    for group, realization in zip(groups, realizations, strict=True):
        if realization is not None:
            replace_group(stage.name, graph, twins, group, realization, tables)
            for layer in group.layers:
                mark(twins[layer.node], "quantize", way)
    ports = tuple(Port(name, (None,), str(v.dtype).removeprefix("torch.")) for name, v in tables.items())
    return finish(replace(stage, inputs=(*stage.inputs, *ports)), graph), tables


def replace_group(
    stage: str,
    graph: fx.GraphModule,
    twins: dict[fx.Node, fx.Node],
    group: Group,
    realization: Realization,
    tables: dict[str, torch.Tensor],
) -> None:
    """Put a realization in the place of a group.

    Args:
        stage: name of the stage of the group.
        graph: a copy of it, which is edited.
        twins: node of the stage -> what stands for it in the copy; the layers get their replacements.
        group: group of the stage.
        realization: realization of the group.
        tables: gets what the copy is to read from tables, name -> [buckets].
    """
    layers = [twins[layer.node] for layer in group.layers]
    place = Place(graph, twins[group.source], layers, [layer.name for layer in group.layers], stage, tables)
    for old, layer, value in zip(group.layers, layers, realization.insert(place), strict=True):
        value.meta.update(layer.meta)
        layer.replace_all_uses_with(value)
        graph.graph.erase_node(layer)
        twins[old.node] = value  # another layer may read this one


def _with_tables(program: Program, values: Mapping[str, torch.Tensor]) -> Program:
    """The program with a table for each name: the value of its bucket at every call of the loop."""
    if not values:
        return program
    assert program.recurrence is not None, "without a loop there is one bucket, and one scale"
    calls = program.recurrence.calls
    tables = {
        name: value[[bucket_of(call, calls, len(value)) for call in range(calls)]].numpy()
        for name, value in values.items()
    }
    return replace(program, tables={**program.tables, **tables})
