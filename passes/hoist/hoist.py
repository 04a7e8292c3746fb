"""Hoist: run at its own rate what does not depend on the latent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import fx

from ...ir.analysis.rates import node_rates
from ...ir.edit import extract, replace_by_inputs
from ...ir.operators import couples_batch
from ...ir.program import Program, Refusal, Stage, slots_of
from ...ir.shapes import follows_batch
from ...loop.errors import UsageError
from ...loop.ports import Rate
from ..base import Context, Options, Pass, PassResult, Phase

BELOW = {
    Rate.STEP: (Rate.ONCE, Rate.TIMESTEP, Rate.ONCE_TIMESTEP),
    Rate.ONCE_TIMESTEP: (Rate.ONCE, Rate.TIMESTEP),
}
"""What can be cut out of a stage of each rate."""


class HoistOptions(Options):
    """`hoist` has no options: what dataflow proves is moved."""


class Hoist(Pass[HoistOptions]):
    """Move what depends on timestep and conditions only into stages of lower rates and tables.

    Rates are proven by dataflow. The frontier of values that a stage reads at a lower rate becomes its inputs; what
    computes them becomes a stage of its own. Stages of rate `timestep` are run for every grid call at once and kept
    as tables [S, ...], so their weights leave the program.
    """

    name = "hoist"
    family = "schedule"
    phase = Phase.HOIST
    source = "stepfold; exact caches of text keys and modulation are hand-written in diffusers (TextKVCache)"
    exact = True
    keeps_activations = True
    options_type = HoistOptions

    def not_applicable(self, program: Program) -> str | None:
        """A component has no loop, so nothing changes more often than once."""
        return None if program.loop is not None else "the program has no loop"

    def requires(self, program: Program) -> None:
        """A scale over a whole batch would cover a different batch in a stage of lower rate."""
        if len(program.computing) > 1:
            raise UsageError(
                "hoist: expected one slot that is filled at every evaluation; received several. Put hoist before cut in "
                "the recipe."
            )
        nodes = [node for stage in program.stages for node in stage.graph.graph.nodes]
        if any(map(couples_batch, nodes)):
            raise UsageError(
                "hoist: expected a program without dynamic quantization, whose scales are those of a whole batch; "
                "received a quantized one. Put hoist before quantize in the recipe."
            )

    def run(self, program: Program, context: Context) -> PassResult:
        """Cut the step stages, then the once×timestep stages, then tabulate the timestep stages."""
        done = bool(program.tables) or any(slot.rate in BELOW[Rate.STEP] for slot in program.slots)
        moved, refused = 0, list[Refusal]()
        for rate in (Rate.STEP, Rate.ONCE_TIMESTEP):
            for stage in [stage for stage in program.stages if stage.rate is rate]:
                program, more, also_refused = _cut(program, stage)
                moved, refused = moved + more, [*refused, *also_refused]
        program = _tabulate(program)
        return PassResult(program, moved, tuple(refused), identity=done and not moved)


def _cut(program: Program, stage: Stage) -> tuple[Program, int, list[Refusal]]:
    """Split everything below the stage's rate out of it; returns how many operators left."""
    rates = node_rates(program)
    frontier, refused = _frontier(stage, rates)
    if not frontier:
        return program, 0, refused
    names = {node: f"{stage.name}.{node.name}" for node in frontier}
    slim = replace_by_inputs(stage, frontier, [names[node] for node in frontier])
    lower = []
    for rate in BELOW[stage.rate]:
        values = [node for node in frontier if rates[node] is rate]
        if values:
            lower.append(extract(stage, _stage_name(program, rate), rate, values, [names[n] for n in values]))
    moved = _operators(stage) - _operators(slim)
    slots = (*slots_of(*lower), *program.with_stage(slim).slots)
    return _ordered(replace(program, slots=slots)), moved, refused


def _frontier(stage: Stage, rates: dict[fx.Node, Rate]) -> tuple[list[fx.Node], list[Refusal]]:
    """The values of lower rate the stage reads, as far downstream as they have the batch in front."""
    below = BELOW[stage.rate]
    candidates: dict[fx.Node, None] = {}
    for node in stage.graph.graph.nodes:
        if rates[node] is stage.rate:
            candidates.update(dict.fromkeys(source for source in node.all_input_nodes if rates[source] in below))
    frontier: dict[fx.Node, None] = {}
    refused: dict[fx.Node, Refusal] = {}
    stack = list(candidates)
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            continue
        if follows_batch(node):
            frontier[node] = None
            continue
        if node.meta.get("shape") is not None:
            refused[node] = Refusal(node.name, f"its first dimension is not the batch: {list(node.meta['shape'])}")
        fresh = [source for source in node.all_input_nodes if rates[source] in below and source not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    order = {node: i for i, node in enumerate(stage.graph.graph.nodes)}
    return sorted(frontier, key=order.__getitem__), list(refused.values())


def _stage_name(program: Program, rate: Rate) -> str:
    base = {Rate.ONCE: "once", Rate.TIMESTEP: "timestep", Rate.ONCE_TIMESTEP: "once_timestep"}[rate]
    taken = sum(slot.rate is rate for slot in program.slots)
    return base if not taken else f"{base}_{taken + 1}"


def _ordered(program: Program) -> Program:
    """Slots in the order of their rates, so that each comes after those it reads from."""
    order = list(Rate)
    return replace(program, slots=tuple(sorted(program.slots, key=lambda slot: order.index(slot.rate))))


def _tabulate(program: Program) -> Program:
    """Run the stages of rate timestep for every grid call and keep the values instead of the stages."""
    recurrence, loop = program.recurrence, program.loop
    assert recurrence is not None and loop is not None
    dtype = next(i.port.dtype for i in program.inputs if i.role == "timestep")
    values = {name: torch.from_numpy(table) for name, table in program.tables.items()}
    values[loop.timestep] = torch.from_numpy(recurrence.timesteps_as(dtype))
    tables: dict[str, np.ndarray] = dict(program.tables)
    for stage in program.stages:
        if stage.rate is not Rate.TIMESTEP:
            continue
        with torch.no_grad():
            outputs = stage.graph(*(values[port.name] for port in stage.inputs))
        values |= {port.name: value for port, value in zip(stage.outputs, outputs, strict=True)}
        tables |= {port.name: value.numpy() for port, value in zip(stage.outputs, outputs, strict=True)}
    kept = tuple(slot for slot in program.slots if slot.rate is not Rate.TIMESTEP)
    return replace(program, slots=kept, tables=tables)


def _operators(stage: Stage) -> int:
    return sum(node.op == "call_function" for node in stage.graph.graph.nodes)
