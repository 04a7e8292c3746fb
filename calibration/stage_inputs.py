"""What the step stage reads along the real loop, for calibrators that want whole batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ..ir.program import Program
from ..loop.driver import LoopRun
from ..loop.noise import SampleSet
from ..loop.ports import BoundProgram, BoundStage
from ..loop.recurrence import Array
from ..loop.table import fold
from .conditions import sample_request

EVALUATIONS = 20
"""Evaluations that are kept, spread over the loop with its first and its last."""
SAMPLES = 4
"""Samples of each: with guidance twice as many rows."""

Inputs = dict[str, Array]


def step_inputs(
    program: Program,
    samples: SampleSet,
    evaluations: int = EVALUATIONS,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> list[Inputs]:
    """Run the real loop with the program's PyTorch reference and keep what its step stage was given.

    Args:
        program: program after the passes so far.
        samples: noise and conditions.
        evaluations: how many to keep; all when the loop has fewer.
        progress: called with (task, done, total).

    Returns:
        For each kept evaluation the inputs of the step stage by name, each [B, ...]. A component has no loop: its
        example is the only batch.
    """
    kept: list[Inputs] = []
    if program.loop is None or program.recurrence is None:
        _recording(program, kept.append).evaluate({name: value.numpy() for name, value in program.example.items()})
        return kept
    scale = program.loop.guidance.scales[0] if program.loop.guidance else None
    table = fold(program.recurrence, scale)
    wanted = {round(position) for position in np.linspace(0, table.evaluations - 1, evaluations)}
    current = 0

    def keep(inputs: Inputs) -> None:
        if current in wanted:
            kept.append(inputs)

    run = LoopRun(_recording(program, keep), program.loop, sample_request(program, samples), table)
    for current in range(table.evaluations):
        run.evaluate(current)
        run.advance(current, table)
        progress("recording inputs", current + 1, table.evaluations)
    return kept


def _recording(program: Program, keep: Callable[[Inputs], None]) -> BoundProgram:
    """The reference of a program; `keep` gets a copy of whatever the step stage reads."""
    bound = program.bind()

    def recorded(stage: BoundStage) -> BoundStage:
        def call(inputs: Mapping[str, Array]) -> list[Array]:
            keep({port.name: np.array(inputs[port.name]) for port in stage.inputs})
            return list(stage.call(inputs))

        return replace(stage, call=call)

    name = program.step.name
    return replace(bound, stages=tuple(recorded(stage) if stage.name == name else stage for stage in bound.stages))
