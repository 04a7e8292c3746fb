"""The probe: a program's outputs on its own example, the measure of every pass."""

from __future__ import annotations

import numpy as np

from ..loop.metrics import drift
from .program import Program

Outputs = list[np.ndarray]

ROWS = 16
"""Most rows of the example that are probed; calibration uses them all."""


def probe_calls(program: Program) -> list[int | None]:
    """The grid calls a program is probed at: first, middle and last; once for a component."""
    if program.recurrence is None:
        return [None]
    calls = program.recurrence.calls
    return list(dict.fromkeys((0, calls // 2, calls - 1)))


def probe_outputs(program: Program) -> Outputs:
    """Every output of the PyTorch reference on the example, at each probed call."""
    bound = program.bind()
    outputs: Outputs = []
    for call in probe_calls(program):
        outputs += bound.evaluate(probe_inputs(program, call), call)
    return outputs


def probe_inputs(program: Program, call: int | None) -> dict[str, np.ndarray]:
    """The first rows of the example inputs with the timestep of a grid call."""
    batched = {item.name for item in program.inputs if item.port.shape[:1] == (None,)}
    inputs = {name: value.numpy()[: ROWS if name in batched else None] for name, value in program.example.items()}
    if call is not None and program.loop is not None and program.recurrence is not None:
        name = program.loop.timestep
        timesteps = program.recurrence.timesteps_as(inputs[name].dtype.name)
        inputs[name] = np.full_like(inputs[name], timesteps[call])
    return inputs


def outputs_drift(outputs: Outputs, reference: Outputs) -> float:
    """The largest relative L2 error over outputs and calls; NaN when an output has one."""
    return float(np.max([drift(value, expected) for value, expected in zip(outputs, reference, strict=True)]))
