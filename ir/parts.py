"""Parts of the loop with a step stage of their own, so that early and late evaluations may differ in precision."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from .program import Program, Stage


def split(program: Program, calls: range) -> Program:
    """The program with no step stage that runs both inside and outside of some grid calls.

    A stage is cut where it has to be; its pieces share graph and weights until a pass changes one of them.

    Args:
        program: program with a loop.
        calls: not empty, within the loop.
    """
    assert program.recurrence is not None
    every = range(program.recurrence.calls)
    steps = program.steps
    stages: list[Stage] = []
    for stage in program.stages:
        stages += _pieces(stage, stage.calls or every, calls) if stage in steps else [stage]
    return replace(program, stages=tuple(stages))


def alone(program: Program, stage: Stage) -> Program:
    """The program with one of its step stages at every call in the place of all of them."""
    if stage.calls is None:
        return program
    kept = [s for s in program.stages if s not in program.steps or s is stage]
    return replace(program, stages=tuple(replace(s, calls=None) if s is stage else s for s in kept))


def put_back(program: Program, stage: Stage, changed: Program) -> Program:
    """The program with what a pass made of `alone(program, stage)`."""
    made = {s.name: replace(s, calls=stage.calls) if s.name == stage.name else s for s in changed.stages}
    return replace(changed, stages=tuple(made.get(s.name, s) for s in program.stages))


def _pieces(stage: Stage, own: range, calls: range) -> list[Stage]:
    """A stage cut at the ends of some calls."""
    edges = [edge for edge in (calls.start, calls.stop) if own.start < edge < own.stop]
    if not edges:
        return [stage]
    base = stage.name if stage.calls is None else stage.name.removesuffix(_suffix(stage.calls))
    spans = [range(first, stop) for first, stop in pairwise([own.start, *edges, own.stop])]
    return [replace(stage, name=f"{base}{_suffix(span)}", calls=span) for span in spans]


def _suffix(calls: range) -> str:
    return f"_{calls.start}_{calls.stop}"
