"""Ranges of activations over the real loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from ..ir.program import Program, Stage, reference
from ..loop.driver import LoopRun
from ..loop.noise import SampleSet
from ..loop.ports import BoundProgram, BoundStage
from ..loop.table import fold
from .conditions import sample_request

SAMPLES = 10
"""Samples the ranges are taken over: every class once on a ten-class model."""


@dataclass
class Range:
    """Smallest and largest value of each channel seen: two [M] tensors, the last dimension of the value."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, value: torch.Tensor) -> Range:
        """The range of one value [..., M]."""
        rows = value.flatten(0, -2)
        return cls(rows.amin(dim=0), rows.amax(dim=0))

    def union(self, other: Range) -> Range:
        """The range of both."""
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def largest(self) -> torch.Tensor:
        """[M] largest magnitude of each channel."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def divided(self, scale: torch.Tensor) -> Range:
        """The range after each channel is divided by a positive scale [M]."""
        return Range(self.low / scale, self.high / scale)


class Observer(fx.Interpreter):
    """Runs a stage and widens the range of every watched node."""

    def __init__(self, graph: fx.GraphModule, watched: Iterable[fx.Node]):
        """Watch nodes of `graph`."""
        super().__init__(graph)
        self.watched = set(watched)
        self.ranges: dict[fx.Node, Range] = {}

    def run_node(self, n: fx.Node) -> object:
        """Run one node; widen its range when it is watched."""
        value = super().run_node(n)
        if n in self.watched:
            seen = Range.of(value)  # type: ignore[arg-type]
            self.ranges[n] = self.ranges[n].union(seen) if n in self.ranges else seen
        return value


def observe_ranges(
    program: Program,
    stage: Stage,
    watched: Iterable[fx.Node],
    seed: int,
    progress: Callable[[str, int, int], None],
) -> dict[fx.Node, Range]:
    """Run the real loop (or the example of a component) and return the range of each watched node of `stage`."""
    observer = Observer(stage.graph, watched)

    def observed(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[port.name])) for port in stage.inputs]
        with torch.no_grad():
            return [output.numpy() for output in observer.run(*tensors)]

    stages = tuple(
        BoundStage(s.name, s.rate, s.inputs, s.outputs, observed if s is stage else reference(s))  # type: ignore[arg-type]
        for s in program.stages
    )
    bound = BoundProgram(program.inputs, program.outputs, stages, program.tables)
    if program.loop is None or program.recurrence is None:
        bound.evaluate({name: value.numpy() for name, value in program.example.items()})
        return observer.ranges
    scale = program.loop.guidance.scales[0] if program.loop.guidance else None
    table = fold(program.recurrence, scale)
    run = LoopRun(bound, program.loop, sample_request(program, SampleSet("calibration", seed, SAMPLES)), table)
    for k in range(table.evaluations):
        run.evaluate(k)
        run.advance(k, table)
        progress("calibrating ranges", k + 1, table.evaluations)
    return observer.ranges
