"""What a search decides before anything is fitted: where the loop is evaluated, and what fills it there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ...loop.plan import REUSED, Cell, Plan
from ...loop.ports import BoundSlot
from ...loop.recurrence import Array

FITTED = "fitted"
"""The method that weighs earlier outputs by least squares; plans that are fitted again use it."""


class Fill(NamedTuple):
    """What fills a slot at a position instead of its original: a variant by number, or a method by name."""

    slot: str
    position: int
    by: int | str


@dataclass(frozen=True)
class Outline:
    """Which calls are evaluated, on which of them both guidance branches run, and what fills the slots there.

    Attributes:
        positions: grid calls that are evaluated, ascending from 0.
        unguided: positions at which only the conditional branch runs.
        fills: slots that something else than their original fills.
    """

    positions: tuple[int, ...]
    unguided: frozenset[int] = frozenset()
    fills: frozenset[Fill] = frozenset()

    @classmethod
    def of(cls, plan: Plan, guided: bool) -> Outline:
        """The outline of a fitted plan; a loop that is not guided has no branches to leave out."""
        positions = tuple(plan.positions.tolist())
        filled = [
            Fill(name, position, FITTED if number == REUSED else int(number))
            for name, cell in plan.cells.items()
            for position, number in zip(positions, cell.variant, strict=True)
            if number
        ]
        unguided = frozenset(plan.positions[~plan.guided].tolist()) if guided else frozenset[int]()
        return cls(positions, unguided, frozenset(filled))

    def without_branch(self, position: int) -> Outline:
        """The outline with one branch only at a position."""
        return replace(self, unguided=self.unguided | {position})

    def filled(self, fill: Fill) -> Outline:
        """The outline with a slot filled otherwise at a position."""
        others = (one for one in self.fills if one[:2] != fill[:2])
        return replace(self, fills=frozenset((*others, fill)))

    def at(self, position: int) -> tuple[bool, frozenset[tuple[str, int | str]]]:
        """What is decided for a position: whether one branch runs, and what fills the slots."""
        return position in self.unguided, frozenset(
            (one.slot, one.by) for one in self.fills if one.position == position
        )

    def reused(self, slot: str) -> dict[int, str]:
        """The evaluations at which a method fills a slot, by number: k -> its name."""
        found = {one.position: one.by for one in self.fills if one.slot == slot and isinstance(one.by, str)}
        return {k: found[position] for k, position in enumerate(self.positions) if position in found}

    def anchors(self, slot: str, guided: Array, k: int, reach: int) -> list[int]:
        """The newest evaluations before k, `reach` at most, whose outputs of a slot evaluation k may weigh."""
        reused = self.reused(slot)
        usable = [j for j in range(k) if j not in reused and (guided[j] or not guided[k])]
        return usable[-reach:]

    def possible(self, guided: Array) -> bool:
        """Whether every slot that a method fills has an earlier output of the branches that run."""
        slots = {one.slot for one in self.fills}
        return all(self.anchors(slot, guided, k, 1) for slot in slots for k in self.reused(slot))

    def cells(self, slots: Iterable[str], guided: Array) -> dict[str, Cell]:
        """Cells of these slots; what a method fills repeats the newest output until its weights are known."""
        N, found = len(self.positions), dict[str, Cell]()
        for slot in slots:
            numbers = {one.position: one.by for one in self.fills if one.slot == slot and isinstance(one.by, int)}
            variant = np.asarray([numbers.get(position, 0) for position in self.positions], np.int64)
            weights = np.zeros((N, N))
            for k in self.reused(slot):
                variant[k] = REUSED
                weights[k, self.anchors(slot, guided, k, 1)] = 1.0
            found[slot] = Cell(variant, weights)
        return found


def fillable(slots: Sequence[BoundSlot]) -> list[BoundSlot]:
    """The slots that a plan may fill in more than one way: bodies of a cut, and slots with variants of its choice."""
    return [slot for slot in slots if slot.by_call is None and (".body" in slot.name or len(slot.variants) > 1)]
