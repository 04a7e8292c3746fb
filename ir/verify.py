"""The rules a well-formed program keeps, checked after every pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..loop.errors import StepfoldError
from ..loop.ports import Port, Rate
from .edit import output_nodes
from .program import Program, Stage

OPERATIONS = ("placeholder", "get_attr", "call_function", "output")


@dataclass(frozen=True)
class Source:
    """Where a stage input may come from: a port and how often it changes."""

    port: Port
    rate: Rate


def verify(program: Program) -> None:
    """Check names, wiring, rates, shapes and graphs.

    Raises:
        StepfoldError: a rule is broken; the message names stage and rule.
    """
    known = {i.name: Source(i.port, Rate.of([i.role])) for i in program.inputs}
    for name, table in program.tables.items():
        known[name] = Source(Port(name, (None, *table.shape[1:]), str(table.dtype)), Rate.TIMESTEP)
    names: set[str] = set()
    for stage in program.stages:
        _require(stage.name not in names, stage, "another stage has its name")
        names.add(stage.name)
        _verify_graph(stage)
        for port in stage.inputs:
            _verify_input(stage, port, known.get(port.name))
        if stage.calls is not None and stage is not program.step:
            continue  # its outputs are those of the first stage that shares the loop
        for port in stage.outputs:
            _require(port.name not in known, stage, f"output {port.name!r} exists already")
            known[port.name] = Source(port, stage.rate)
    _verify_parts(program)
    for name in program.outputs:
        if name not in known:
            raise StepfoldError(f"program: output {name!r} is not produced by any stage.")


def _verify_parts(program: Program) -> None:
    """Stages with calls of their own compute the same, and one of them runs at every call."""
    parts = [stage for stage in program.stages if stage.calls is not None]
    covered = [call for stage in parts for call in stage.calls or ()]
    for stage in parts:
        _require(stage.outputs == program.step.outputs, stage, "it shares the loop with stages of other outputs")
        whole = program.recurrence is not None and sorted(covered) == list(range(program.recurrence.calls))
        _require(whole, stage, f"each call of the loop has one stage; calls with one are {sorted(covered)}")


def _verify_input(stage: Stage, port: Port, source: Source | None) -> None:
    if source is None:
        raise _broken(stage, f"input {port.name!r} is neither a program input nor an output of an earlier stage")
    _require(port == source.port, stage, f"input {port} comes from {source.port}")
    _require(
        source.rate.roles <= stage.rate.roles,
        stage,
        f"input {port.name!r} changes at rate {source.rate}, the stage runs at {stage.rate}",
    )


def _verify_graph(stage: Stage) -> None:
    try:
        stage.graph.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise _broken(stage, f"the graph is well-formed: {str(error).splitlines()[0]}") from error
    for node in stage.graph.graph.nodes:
        kind = f"node {node.name} is a {node.op}: only functions and weights belong in a stage"
        _require(node.op in OPERATIONS, stage, kind)
        _require(node.op == "output" or "val" in node.meta, stage, f"node {node.name} has no shape")
    _verify_ports(stage, "input", stage.graph.graph.find_nodes(op="placeholder"), stage.inputs)
    _verify_ports(stage, "output", output_nodes(stage), stage.outputs)


def _verify_ports(stage: Stage, kind: str, nodes: Sequence, ports: Sequence[Port]) -> None:
    _require(len(nodes) == len(ports), stage, f"one node for each {kind}: {len(nodes)} nodes, {len(ports)} ports")
    for node, port in zip(nodes, ports, strict=True):
        shape = node.meta.get("shape")
        dtype = str(getattr(node.meta["val"], "dtype", None)).removeprefix("torch.")
        same = (shape, dtype) == (port.shape, port.dtype)
        _require(same, stage, f"{kind} {port} is {dtype} {shape} in the graph")


def _require(holds: bool, stage: Stage, rule: str) -> None:
    if not holds:
        raise _broken(stage, rule)


def _broken(stage: Stage, rule: str) -> StepfoldError:
    return StepfoldError(f"stage {stage.name}: broken rule: {rule}.")
