"""The rules a well-formed program keeps, checked after every pass."""

from __future__ import annotations

from ..loop.errors import StepfoldError
from .edit import output_nodes
from .program import Program, Stage


def verify(program: Program) -> None:
    """Check names, wiring, shapes and graphs.

    Raises:
        StepfoldError: a rule is broken; the message names stage and rule.
    """
    known = {i.name: i.port for i in program.inputs}
    known_names = set(known) | set(program.tables)
    for stage in program.stages:
        _verify_graph(stage)
        for port in stage.inputs:
            _require(port.name in known_names, stage, f"input {port.name!r} is neither a program input nor an output "
                     "of an earlier stage")
            if port.name in known:
                _require(known[port.name].dtype == port.dtype, stage, f"input {port.name!r} is declared "
                         f"{port.dtype}, its source is {known[port.name].dtype}")
        for port in stage.outputs:
            _require(port.name not in known_names, stage, f"output {port.name!r} exists already")
            known[port.name] = port
            known_names.add(port.name)
    for name in program.outputs:
        if name not in known:
            raise StepfoldError(f"program: output {name!r} is not produced by any stage.")


def _verify_graph(stage: Stage) -> None:
    stage.graph.graph.lint()
    placeholders = [node for node in stage.graph.graph.nodes if node.op == "placeholder"]
    _require(len(placeholders) == len(stage.inputs), stage, "one placeholder for each input port")
    outputs = output_nodes(stage)
    _require(len(outputs) == len(stage.outputs), stage, "one value for each output port")
    for node, port in zip(outputs, stage.outputs, strict=True):
        _require(node.meta.get("shape") == port.shape, stage, f"output {port.name!r} is declared "
                 f"{list(port.shape)}, the graph gives {node.meta.get('shape')}")
    for node in stage.graph.graph.nodes:
        _require(node.op in ("placeholder", "get_attr", "call_function", "output"), stage, f"node {node.name} is a "
                 f"{node.op}: only functions and weights belong in a stage")
        _require(node.op == "output" or "val" in node.meta, stage, f"node {node.name} has no shape")


def _require(holds: bool, stage: Stage, rule: str) -> None:
    if not holds:
        raise StepfoldError(f"stage {stage.name}: broken rule: {rule}.")
