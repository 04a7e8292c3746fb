"""The pass `hoist` on its own, and what it has to keep."""

from __future__ import annotations

from pathlib import Path

from programs import context_of, operators, samples_of

from stepfold.ir.program import Program
from stepfold.ir.verify import verify
from stepfold.loop.metrics import drift
from stepfold.loop.ports import Rate
from stepfold.passes.base import PassResult
from stepfold.passes.hoist.hoist import Hoist, HoistOptions

EXACT = 1e-5  # relative L2 of samples, the tolerance of float32


def hoist(program: Program) -> PassResult:
    return Hoist(HoistOptions()).run(program, context_of(program, Path("unused")))


def by_rate(program: Program) -> dict[Rate, list[str]]:
    return {stage.rate: operators(stage) for stage in program.stages}


def assert_same_samples(before: Program, after: Program, count: int = 5) -> None:
    verify(after)
    error = drift(samples_of(after, count=count), samples_of(before, count=count))
    assert error <= EXACT, error
