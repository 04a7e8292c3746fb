"""Ranges and second moments of activations over the real loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx

from ..ir.program import Program
from ..loop.driver import LoopRun
from ..loop.noise import SampleSet
from ..loop.plan import fold
from .conditions import sample_request
from .document import bucket_of
from .observe import watched_program
from .plan import BUCKETS
from .read import ROWS_PER_CHANNEL

SAMPLES = 10
"""Samples the ranges are taken over: every class once on a ten-class model."""
GRAM_ROWS_PER_CHANNEL = 8
"""Rows for each channel of a Gram matrix, drawn evenly from all evaluations; more change 8-bit codes by little."""


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


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen of watched values.

    Attributes:
        ranges: range of each channel of each watched value.
        grams: [M, M] float64, mean of x x^T over a seeded choice of rows, of the values that it was asked for and that
            had at least `ROWS_PER_CHANNEL` rows for each channel.
    """

    ranges: Mapping[fx.Node, Range]
    grams: Mapping[fx.Node, torch.Tensor]


def observe(
    program: Program,
    watched: Iterable[fx.Node],
    seed: int,
    progress: Callable[[str, int, int], None],
    grams: Collection[fx.Node] = (),
) -> Observed:
    """Run the real loop, or the example of a component, and watch values of the computing slots.

    Args:
        program: a captured program.
        watched: nodes of its computing slots.
        seed: seed of the samples and of the rows that enter Gram matrices.
        progress: called with (task, done, total).
        grams: watched nodes of which a Gram matrix is wanted.
    """
    observer = _Observer(torch.Generator().manual_seed(seed), frozenset(grams))
    bound = watched_program(program, {node: partial(observer.see, node) for node in watched})
    if program.loop is None or program.recurrence is None:
        bound.evaluate({name: value.numpy() for name, value in program.example.items()})
        return observer.observed()
    scale = program.loop.guidance.scales[0] if program.loop.guidance else None
    plan = fold(program.recurrence, scale)
    observer.calls, observer.buckets = plan.evaluations, min(BUCKETS, plan.evaluations)
    run = LoopRun(bound, program.loop, sample_request(program, SampleSet("calibration", seed, SAMPLES)), plan)
    for k in range(plan.evaluations):
        observer.bucket = bucket_of(k, plan.evaluations, observer.buckets)
        run.evaluate(k)
        run.advance(k, plan)
        progress("calibrating", k + 1, plan.evaluations)
    return observer.observed()


@dataclass
class _Observer:
    """What has been seen so far, and the bucket that is being run.

    Attributes:
        generator: draws the rows of Gram matrices.
        wanted: nodes of which a Gram matrix is wanted.
        calls: evaluations that the whole run has.
    """

    generator: torch.Generator
    wanted: frozenset[fx.Node]
    calls: int = 1
    bucket: int = 0
    buckets: int = 1
    ranges: dict[fx.Node, Range] = field(default_factory=dict)
    grams: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    rows: dict[fx.Node, int] = field(default_factory=dict)

    def see(self, node: fx.Node, value: torch.Tensor) -> None:
        """Take a value [..., M] in."""
        seen = Range.of(value, self.bucket, self.buckets)
        self.ranges[node] = self.ranges[node].union(seen) if node in self.ranges else seen
        if node in self.wanted:
            self._see_rows(node, value.flatten(0, -2).float())

    def _see_rows(self, node: fx.Node, rows: torch.Tensor) -> None:
        """Take the share of this evaluation in the rows [T, M] of a Gram matrix; sums of products are float32."""
        share = math.ceil(GRAM_ROWS_PER_CHANNEL * rows.shape[1] / self.calls)
        if share < len(rows):
            rows = rows[torch.randperm(len(rows), generator=self.generator)[:share]]
        if node in self.grams:
            self.grams[node].addmm_(rows.T, rows)
        else:
            self.grams[node] = rows.T @ rows
        self.rows[node] = self.rows.get(node, 0) + len(rows)

    def observed(self) -> Observed:
        """The ranges, and the Gram matrices of enough rows."""
        enough = [node for node in self.grams if self.rows[node] >= ROWS_PER_CHANNEL * self.grams[node].shape[0]]
        return Observed(self.ranges, {node: self.grams[node].double() / self.rows[node] for node in enough})
