"""What an evaluation costs: seconds of each slot on the engine, measured, with one guidance branch and with both."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...loop.driver import LoopRun, Request
from ...loop.plan import Cell, Plan
from ...loop.ports import BoundProgram, BoundSlot, BoundStage
from ...loop.recurrence import Array
from ...loop.spec import LoopSpec
from .outline import Outline, fillable

TURNS = 5
"""Calls of each stage, after one that is not counted; the fastest counts, because noise only adds."""

Key = tuple[str, int, bool]


@dataclass(frozen=True)
class Costs:
    """What filling a slot costs, in one unit for all of them.

    Attributes:
        of_slots: (slot, variant, both branches) -> cost of one call.
        unit: `s` where it was measured, `rows` where only the number of branches differs.
    """

    of_slots: Mapping[Key, float]
    unit: str

    @classmethod
    def counted(cls, slots: Sequence[BoundSlot]) -> Costs:
        """One for each branch of an evaluation: enough where every evaluation runs the same slots."""
        share = 1 / max(1, len(slots))
        return cls({(slot.name, 0, both): (1 + both) * share for slot in slots for both in (False, True)}, "rows")

    @classmethod
    def measured(cls, bound: BoundProgram, loop: LoopSpec, request: Request, plan: Plan) -> Costs:
        """Seconds on the engine, for one sample.

        Args:
            bound: the program on the engine.
            loop: names of the inputs by role.
            request: conditions of at least one sample.
            plan: a plan of at least one evaluation.
        """
        clock = _Clock(bound)
        one = _first(request)
        for both in sorted({False, bool(plan.guided.any())}):
            for number in range(max(len(slot.variants) for slot in bound.computing)):
                run = LoopRun(clock.program, loop, one, _filled(plan, bound.computing, number, both))
                for _ in range(1 + TURNS):
                    run.evaluate(0)
        return cls({key: min(times[1:]) for key, times in clock.times.items()}, "s")

    def of(self, outline: Outline, guided: Array) -> float:
        """The cost of all evaluations of an outline; what a method fills costs nothing."""
        filled = {fill[:2]: fill.by for fill in outline.fills}
        slots = {name for name, _, _ in self.of_slots}
        total = 0.0
        for position, both in zip(outline.positions, guided, strict=True):
            for name in slots:
                by = filled.get((name, position), 0)
                total += self.of_slots[name, by, bool(both)] if isinstance(by, int) else 0.0
        return total


class _Clock:
    """A program whose computing slots note how long they take."""

    def __init__(self, bound: BoundProgram):
        self.times: dict[Key, list[float]] = {}
        self._rows = 0
        slots = [replace(slot, variants=self._timed(slot)) if slot in bound.computing else slot for slot in bound.slots]
        self.program = replace(bound, slots=tuple(slots))

    def _timed(self, slot: BoundSlot) -> tuple[BoundStage, ...]:
        return tuple(replace(stage, call=self._noted(slot.name, i, stage)) for i, stage in enumerate(slot.variants))

    def _noted(self, slot: str, number: int, stage: BoundStage):
        def call(inputs: Mapping[str, Array]) -> Sequence[Array]:
            start = time.perf_counter()
            outputs = stage.call(inputs)
            seconds = time.perf_counter() - start
            rows = len(next(iter(inputs.values())))
            self.times.setdefault((slot, number, rows > 1), []).append(seconds)
            return outputs

        return call


def _first(request: Request) -> Request:
    """The first sample of a request."""
    unconditional = request.unconditional
    return Request(
        request.noise[:1],
        {name: value[:1] for name, value in request.conditions.items()},
        None if unconditional is None else {name: value[:1] for name, value in unconditional.items()},
    )


def _filled(plan: Plan, slots: Sequence[BoundSlot], number: int, both: bool) -> Plan:
    """The plan with a variant everywhere, where a slot has it, and one branch or both at every evaluation."""
    N = plan.evaluations
    cells = {
        slot.name: Cell(np.full(N, min(number, len(slot.variants) - 1)), np.zeros((N, N))) for slot in fillable(slots)
    }
    guided, zero = np.full(N, both), np.zeros((N, N))
    return replace(plan, guided=guided, cells=cells, unconditional=plan.unconditional if both else zero)
