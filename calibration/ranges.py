"""Ranges of activations over the real loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx

from ..ir.program import Program
from ..loop.driver import LoopRun
from ..loop.noise import SampleSet
from ..loop.table import fold
from .conditions import sample_request
from .document import bucket_of
from .observe import watched_program
from .plan import BUCKETS

SAMPLES = 10
"""Samples the ranges are taken over: every class once on a ten-class model."""


@dataclass(frozen=True, eq=False)
class Range:
    """Smallest and largest value of each channel, the last dimension of a value, in each timestep bucket.

    Attributes:
        low: [buckets, M].
        high: [buckets, M].
    """

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, value: torch.Tensor, bucket: int, buckets: int) -> Range:
        """The range of one value [..., M] seen in one bucket; the others are empty: +inf and -inf."""
        rows = value.flatten(0, -2)
        low, high = (rows.new_full((buckets, rows.shape[1]), end) for end in (torch.inf, -torch.inf))
        low[bucket], high[bucket] = rows.amin(dim=0), rows.amax(dim=0)
        return cls(low, high)

    def union(self, other: Range) -> Range:
        """The range of both."""
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))


def observe_ranges(
    program: Program, watched: Iterable[fx.Node], seed: int, progress: Callable[[str, int, int], None]
) -> dict[fx.Node, Range]:
    """Run the real loop (or the example of a component): the range of each watched node of the step stage."""
    observer = _Ranges()
    bound = watched_program(program, {node: partial(observer.widen, node) for node in watched})
    if program.loop is None or program.recurrence is None:
        bound.evaluate({name: value.numpy() for name, value in program.example.items()})
        return observer.ranges
    scale = program.loop.guidance.scales[0] if program.loop.guidance else None
    table = fold(program.recurrence, scale)
    observer.buckets = min(BUCKETS, table.evaluations)
    run = LoopRun(bound, program.loop, sample_request(program, SampleSet("calibration", seed, SAMPLES)), table)
    for k in range(table.evaluations):
        observer.bucket = bucket_of(k, table.evaluations, observer.buckets)
        run.evaluate(k)
        run.advance(k, table)
        progress("calibrating ranges", k + 1, table.evaluations)
    return observer.ranges


@dataclass
class _Ranges:
    """The ranges seen so far, and the bucket that is being run."""

    ranges: dict[fx.Node, Range] = field(default_factory=dict)
    bucket: int = 0
    buckets: int = 1

    def widen(self, node: fx.Node, value: torch.Tensor) -> None:
        seen = Range.of(value, self.bucket, self.buckets)
        self.ranges[node] = self.ranges[node].union(seen) if node in self.ranges else seen
