"""The rules a well-formed program keeps, checked after every pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..loop.errors import StepfoldError
from ..loop.ports import Port, Rate
from .edit import output_nodes
from .program import Program, Slot, Stage

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
    for slot in program.slots:
        _verify_variants(program, slot)
        for stage in slot.variants:
            _require(stage.name not in names, stage, "another stage has its name")
            names.add(stage.name)
            _verify_graph(stage)
            for port in stage.inputs:
                _verify_input(stage, port, known.get(port.name))
        for port in slot.outputs:
            _require(port.name not in known, slot.original, f"output {port.name!r} exists already")
            known[port.name] = Source(port, slot.rate)
    for name in program.outputs:
        if name not in known:
            raise StepfoldError(f"program: output {name!r} is not produced by any stage.")


def _verify_variants(program: Program, slot: Slot) -> None:
    """The variants of a slot compute the same, and one of them runs at every call."""
    for stage in slot.variants:
        _require(stage.outputs == slot.outputs, stage, "it shares a slot with stages of other outputs")
        _require(stage.rate is slot.rate, stage, "it shares a slot with stages of another rate")
    alone = len(slot.variants) == 1 and slot.by_call is None
    _require(alone or slot.rate is Rate.STEP, slot.original, "only a slot of rate step has several variants")
    if slot.by_call is not None:
        calls = program.recurrence.calls if program.recurrence is not None else 0
        numbered = len(slot.by_call) == calls and set(slot.by_call) <= set(range(len(slot.variants)))
        rule = f"one of its {len(slot.variants)} variants at each of {calls} calls; they are {list(slot.by_call)}"
        _require(numbered, slot.original, rule)


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
