"""What a schedule may leave out at an evaluation: the unconditional branch, or a slot that something cheaper fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...loop.recurrence import Array
from .costs import Costs
from .outline import Fill, Outline

Score = Callable[[Outline], float]
Guided = Callable[[Outline], Array]
Saving = Callable[[Outline], Outline]

LEAST_LOSS = 1e-3
"""Decibels; a saving whose score loses less counts as losing this much, so that what it saves decides."""

MISSES = 3
"""Savings in a row that cost too much before the rest, which is worse still, is not tried."""


class Menu(NamedTuple):
    """What may fill a slot beside its original."""

    slot: str
    fillings: tuple[int | str, ...]


class Savings:
    """Savings on one outline, the one that loses least for what it saves first."""

    def __init__(self, score: Score, guided: Guided, costs: Costs, menus: Sequence[Menu]):
        """Judge outlines by `score`, in dB, and by their cost."""
        self._score, self._guided, self._costs, self._menus = score, guided, costs, menus

    def cost(self, outline: Outline) -> float:
        """The cost of an outline."""
        return self._costs.of(outline, self._guided(outline))

    def outlines(self, full: Outline, least: float) -> list[Outline]:
        """Cheaper and cheaper outlines of these positions whose score is at least `least`."""
        found, missed, current = list[Outline](), 0, full
        for saving in self._ranked(full):
            outline = saving(current)
            if not outline.possible(self._guided(outline)) or self.cost(outline) >= self.cost(current):
                continue
            if self._score(outline) >= least:
                current, missed = outline, 0
                found.append(outline)
            else:
                missed += 1
                if missed == MISSES:
                    break
        return found

    def _ranked(self, full: Outline) -> list[Saving]:
        """All savings, by what each loses alone for what it saves alone."""
        whole, start = self.cost(full), self._score(full)
        ranked = list[tuple[float, Saving]]()
        for saving in self._all(full):
            outline = saving(full)
            if outline.possible(self._guided(outline)) and self.cost(outline) < whole:
                loss = max(LEAST_LOSS, start - self._score(outline))
                ranked.append((loss / (whole - self.cost(outline)), saving))
        return [saving for _, saving in sorted(ranked, key=lambda item: item[0])]

    def _all(self, full: Outline) -> list[Saving]:
        branches = [_drop(one) for one, both in zip(full.positions, self._guided(full), strict=True) if both]
        fills = [
            _fill(Fill(menu.slot, position, by))
            for menu in self._menus
            for by in menu.fillings
            for position in full.positions
        ]
        return [*branches, *fills]


def _drop(position: int) -> Saving:
    return lambda outline: outline.without_branch(position)


def _fill(fill: Fill) -> Saving:
    return lambda outline: outline.filled(fill)
