"""Conditions of calibration samples: classes in turn, or the example's own values."""

from __future__ import annotations

import numpy as np
import torch

from ..ir.program import Program
from ..loop.classes import class_conditions, class_input
from ..loop.driver import Request
from ..loop.errors import StepfoldError
from ..loop.noise import SampleSet
from ..loop.recurrence import Array


def sample_request(program: Program, samples: SampleSet) -> Request:
    """Noise and conditions of a sample set.

    A class index takes its valid values in turn; any other condition cycles through the rows of the example the
    program was captured with, and so does the other branch where a pipeline gave it values of its own; elsewhere in
    that branch a condition without a declared value keeps its value, or is zero where the caller has to give it.
    """
    loop = program.loop
    if loop is None:
        raise StepfoldError("calibration: the program has no loop; there are no trajectories to run.")
    if class_input(program.inputs, loop) is not None:
        conditions = class_conditions(program.inputs, loop, samples.count)
    else:
        names = [port.name for port in program.inputs if port.role == "condition"]
        conditions = {name: _cycle(program.example[name], samples.count) for name in names}
    unconditional = None
    if loop.guidance is not None:
        given = loop.guidance.unconditional
        values = given if isinstance(given, dict) else dict.fromkeys(conditions, 0)
        unconditional = {
            name: np.full_like(value, values[name]) if name in values else value for name, value in conditions.items()
        } | {name: _cycle(rows, samples.count) for name, rows in program.unconditional.items()}
    return Request(samples.noise(loop.noise_shape), conditions, unconditional)


def _cycle(rows: torch.Tensor, count: int) -> Array:
    return rows.numpy()[np.arange(count) % len(rows)]
