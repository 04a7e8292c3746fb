"""Variants of the computing slots, so that early and late evaluations may differ in precision, width or network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .program import Program, Slot, Stage


def split(program: Program, calls: range) -> Program:
    """The program with no stage of a computing slot that runs both inside and outside of some grid calls.

    A stage that does gets a twin for the calls inside; both share graph and weights until a pass changes one of them.

    Args:
        program: program with a loop.
        calls: not empty, within the loop.
    """
    assert program.recurrence is not None
    every, names = program.recurrence.calls, {stage.name for stage in program.stages}
    computing = program.computing
    slots = [_split(slot, calls, every, names) if slot in computing else slot for slot in program.slots]
    return replace(program, slots=tuple(slots))


def numbers_at(program: Program, calls: Sequence[int] | None = None) -> list[int]:
    """The numbers of the variants that run at some grid calls, ascending; None takes every variant there is.

    Variants of one number run together: a number that a slot lacks stands for its original.
    """
    computing = program.computing
    if calls is None:
        return list(range(max(len(slot.variants) for slot in computing)))
    return sorted({0 if slot.by_call is None else slot.by_call[call] for slot in computing for call in calls})


def alone(program: Program, number: int) -> Program:
    """The program with the variants of one number in its computing slots, at every call."""
    computing = program.computing
    slots = (replace(s, variants=(_numbered(s, number),), by_call=None) if s in computing else s for s in program.slots)
    return replace(program, slots=tuple(slots))


def put_back(program: Program, changed: Program) -> Program:
    """The program with what a pass made of `alone(program, number)`; stages are known by their names."""
    return replace(changed, slots=program.with_stages(changed.stages).slots)


def _numbered(slot: Slot, number: int) -> Stage:
    return slot.variants[number] if number < len(slot.variants) else slot.original


def _split(slot: Slot, calls: range, every: int, names: set[str]) -> Slot:
    """A slot whose variants run either inside of some calls or outside; new names are added to those that are taken."""
    by_call, variants = list(slot.by_call or [0] * every), list(slot.variants)
    for number in range(len(slot.variants)):
        inside = [call for call in calls if by_call[call] == number]
        if not inside or len(inside) == by_call.count(number):
            continue
        for call in inside:
            by_call[call] = len(variants)
        name = next(name for i in range(1, every + 1) if (name := f"{slot.name}_{i}") not in names)
        names.add(name)
        variants.append(replace(variants[number], name=name))
    return replace(slot, variants=tuple(variants), by_call=tuple(by_call) if len(variants) > 1 else None)
