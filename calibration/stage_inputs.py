"""What the computing slots read along the real loop, for calibrators that want whole batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..ir.program import Program, Stage, reference
from ..loop.driver import LoopRun
from ..loop.noise import SampleSet
from ..loop.plan import fold
from ..loop.ports import StageCallable
from ..loop.recurrence import Array
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
    """Run the real loop with the program's PyTorch reference and keep what its computing slots were given.

    Args:
        program: program after the passes so far.
        samples: noise and conditions.
        evaluations: how many to keep; all when the loop has fewer.
        progress: called with (task, done, total).

    Returns:
        For each kept evaluation the inputs of the stages by name, each [B, ...]. A component has no loop: its example is
        the only batch.
    """
    read: Inputs = {}
    bound = program.bound_by(lambda stage: _recording(stage, read) if stage in program.steps else reference(stage))
    if program.loop is None or program.recurrence is None:
        bound.evaluate({name: value.numpy() for name, value in program.example.items()})
        return [read]
    scale = program.loop.guidance.scales[0] if program.loop.guidance else None
    plan = fold(program.recurrence, scale)
    wanted = {round(position) for position in np.linspace(0, plan.evaluations - 1, evaluations)}
    kept: list[Inputs] = []
    run = LoopRun(bound, program.loop, sample_request(program, samples), plan)
    for k in range(plan.evaluations):
        run.evaluate(k)
        if k in wanted:
            kept.append(dict(read))
        read.clear()
        run.advance(k, plan)
        progress("recording inputs", k + 1, plan.evaluations)
    return kept


def _recording(stage: Stage, read: Inputs) -> StageCallable:
    """The reference of a stage; `read` gets a copy of whatever it is given."""
    call = reference(stage)

    def recorded(inputs: Mapping[str, Array]) -> list[Array]:
        read.update({port.name: np.array(inputs[port.name]) for port in stage.inputs})
        return list(call(inputs))

    return recorded
