"""Ranges of activations over the real loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from ..ir.program import Program
from ..loop.driver import LoopRun
from ..loop.noise import SampleSet
from ..loop.table import fold
from .conditions import sample_request
from .observe import watched_program

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


def observe_ranges(
    program: Program, watched: Iterable[fx.Node], seed: int, progress: Callable[[str, int, int], None]
) -> dict[fx.Node, Range]:
    """Run the real loop (or the example of a component): the range of each watched node of the step stage."""
    ranges: dict[fx.Node, Range] = {}

    def widen(node: fx.Node, value: torch.Tensor) -> None:
        seen = Range.of(value)
        ranges[node] = ranges[node].union(seen) if node in ranges else seen

    bound = watched_program(program, {node: partial(widen, node) for node in watched})
    if program.loop is None or program.recurrence is None:
        bound.evaluate({name: value.numpy() for name, value in program.example.items()})
        return ranges
    scale = program.loop.guidance.scales[0] if program.loop.guidance else None
    table = fold(program.recurrence, scale)
    run = LoopRun(bound, program.loop, sample_request(program, SampleSet("calibration", seed, SAMPLES)), table)
    for k in range(table.evaluations):
        run.evaluate(k)
        run.advance(k, table)
        progress("calibrating ranges", k + 1, table.evaluations)
    return ranges
