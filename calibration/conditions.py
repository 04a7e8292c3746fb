"""Conditions of calibration samples: classes in turn, or the example's own values."""

from __future__ import annotations

import numpy as np

from ..ir.program import Program
from ..loop.classes import class_conditions, class_input
from ..loop.driver import Request
from ..loop.errors import StepfoldError
from ..loop.noise import SampleSet
from ..loop.recurrence import Array


def sample_request(program: Program, samples: SampleSet) -> Request:
    """Noise and conditions of a sample set.

    A class index takes its valid values in turn; any other condition cycles through the rows of the example the
    program was captured with. In the unconditional branch a condition without a declared value keeps its value.
    """
    loop = program.loop
    if loop is None:
        raise StepfoldError("calibration: the program has no loop; there are no trajectories to run.")
    if class_input(program.inputs, loop) is not None:
        conditions = class_conditions(program.inputs, loop, samples.count)
    else:
        conditions = {i.name: _cycle(program, i.name, samples.count) for i in program.inputs if i.role == "condition"}
    unconditional = None
    if loop.guidance is not None:
        given = loop.guidance.unconditional
        values = given if isinstance(given, dict) else dict.fromkeys(conditions, 0)
        unconditional = {
            name: np.full_like(value, values[name]) if name in values else value for name, value in conditions.items()
        }
    return Request(samples.noise(loop.latent.shape), conditions, unconditional)


def _cycle(program: Program, name: str, count: int) -> Array:
    rows = program.example[name].numpy()
    return rows[np.arange(count) % len(rows)]
