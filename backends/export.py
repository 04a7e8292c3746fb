"""A stage as PyTorch exports it for an engine: operators replaced, batch dynamic, nodes found again in messages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..ir.operators import RECORDS
from ..ir.program import Stage
from ..ir.shapes import example
from ..loop.errors import StepfoldError

Lowerings = Mapping[Any, Callable[..., Any]]


def lowered(stage: Stage, lowerings: Lowerings) -> fx.GraphModule:
    """The stage's graph with every operator replaced that the engine has a lowering of; weights are shared, not copied.

    A `stepfold::` operator without one is replaced by its portable form.

    Raises:
        StepfoldError: it has no portable form.
    """
    graph = fx.GraphModule(stage.graph, copy.deepcopy(stage.graph.graph))
    for node in graph.graph.nodes:
        form = _form(node, lowerings)
        if form is not None:
            node.target = form
        elif getattr(node.target, "namespace", None) == "stepfold":
            raise StepfoldError(f"stage {stage.name}: {where(node)}: {node.target} has no lowering for this engine.")
    graph.recompile()
    return graph


def _form(node: fx.Node, lowerings: Lowerings) -> Callable[..., Any] | None:
    """What takes the place of a node's operator, if anything does."""
    if node.op != "call_function":
        return None
    record = RECORDS.get(node.target)
    return lowerings.get(node.target) or (None if record is None else record.portable)


def where(node: fx.Node) -> str:
    """A node as a user can find it: its name, module path and source line."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path = modules[-1][0] if modules else "top level"
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return f"node {node.name} ({path or 'top level'}; {lines[-1] if lines else 'no source line'})"


def export_again(stage: Stage, graph: fx.GraphModule) -> torch.export.ExportedProgram:
    """Export a graph with the ports of a stage, which validates it; the batch stays dynamic where it can."""
    arguments = tuple(example(port) for port in stage.inputs)
    dynamic = tuple({0: torch.export.Dim.AUTO} if port.shape[:1] == (None,) else None for port in stage.inputs)
    with torch.no_grad():
        # the generated forward has named parameters, so the dynamic shapes are given one for each of them
        return torch.export.export(graph.eval(), arguments, dynamic_shapes=dynamic, strict=False)
