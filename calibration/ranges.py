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
    """Smallest and largest value seen."""

    low: float = float("inf")
    high: float = float("-inf")

    def widen(self, value: torch.Tensor) -> None:
        """Include all values of a tensor."""
        self.low = min(self.low, float(value.min()))
        self.high = max(self.high, float(value.max()))


class Observer(fx.Interpreter):
    """Runs a stage and widens the range of every watched node."""

    def __init__(self, graph: fx.GraphModule, watched: Iterable[fx.Node]):
        """Watch nodes of `graph`."""
        super().__init__(graph)
        self.ranges = {node: Range() for node in watched}

    def run_node(self, n: fx.Node) -> object:
        """Run one node; widen its range when it is watched."""
        value = super().run_node(n)
        if n in self.ranges:
            self.ranges[n].widen(value)  # type: ignore[arg-type]
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
        run.update(float(table.state[k]), table.conditional[k], table.unconditional[k])
        for j in [j for j in run.history if table.last_reader(j) <= k]:
            run.forget(j)
        progress("calibrating ranges", k + 1, table.evaluations)
    return observer.ranges
