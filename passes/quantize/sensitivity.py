"""What a change of a program does to the samples of a short loop."""

from __future__ import annotations

import numpy as np

from ...calibration.conditions import sample_request
from ...ir.program import Program
from ...loop.driver import run_loop
from ...loop.metrics import drift
from ...loop.noise import SampleSet
from ...loop.plan import fold
from ..base import Context

SAMPLES = 4
EVALUATIONS = 12
"""Evenly spaced calls of the sampler: enough for errors to act on each other, a quarter of the time."""


class SampleDrift:
    """Relative L2 change of the outputs of a closed loop, in PyTorch; of the outputs on the example of a component."""

    def __init__(self, program: Program, context: Context):
        """Run the program as it is.

        Args:
            program: program that changes are compared with.
            context: its seed draws the samples, of the calibration set.
        """
        self._program, self._seed = program, context.seed
        self._reference = self._outputs(program)

    def of(self, changed: Program) -> float:
        """The drift of a changed program."""
        return drift(self._outputs(changed), self._reference)

    def _outputs(self, program: Program) -> np.ndarray:
        bound = program.bind()
        if program.loop is None or program.recurrence is None:
            return bound.evaluate({name: value.numpy() for name, value in program.example.items()})[0]
        request = sample_request(program, SampleSet("calibration", self._seed, SAMPLES))
        calls = program.recurrence.calls
        positions = np.unique(np.linspace(0, calls, min(EVALUATIONS, calls), endpoint=False).astype(int))
        scale = program.loop.guidance.scales[0] if program.loop.guidance else None
        return run_loop(bound, program.loop, request, fold(program.recurrence, scale, positions.tolist()))
