"""How many bits each site gets: least damage within a budget, a knapsack with one choice for each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from ....loop.errors import UsageError

CELLS = 10_000
"""Into how many parts the budget is cut; costs are exact when they fit, else rounded up."""


@dataclass(frozen=True)
class Choice:
    """One way to quantize a site.

    Attributes:
        name: name of the format, the same at every site that offers it.
        cost: bytes, or any other count the budget is in.
        damage: what is added up over sites; squared drifts add up when errors are independent.
    """

    name: str
    cost: int
    damage: float


@dataclass(frozen=True)
class Allocation:
    """One choice for each site, and what they come to."""

    choices: Mapping[str, Choice]

    @property
    def cost(self) -> int:
        """Sum of the costs."""
        return sum(choice.cost for choice in self.choices.values())

    @property
    def damage(self) -> float:
        """Sum of the damages."""
        return sum(choice.damage for choice in self.choices.values())


def allocate(sites: Mapping[str, Sequence[Choice]], budget: int) -> Allocation:
    """The choices of least total damage whose total cost is at most the budget.

    Exact by dynamic programming where the costs fit into `CELLS`; else costs are rounded up, what that leaves of the
    budget is spent on the best single changes, and the best choice that all sites share is taken if it is better.

    Args:
        sites: site -> what it may become.
        budget: budget in the unit of the costs.

    Returns:
        An allocation never worse than any one format for all sites within the budget; of equals, the cheapest.

    Raises:
        UsageError: a site has no choice or an unusable one, or the budget is below the cheapest choices.
    """
    _expect_choices(sites)
    cheapest = sum(min(choice.cost for choice in choices) for choices in sites.values())
    if cheapest > budget:
        raise UsageError(f"budget: expected at least {cheapest}, the cheapest choices; received {budget}. Raise it.")
    unit = _unit([choice.cost for choices in sites.values() for choice in choices], budget)
    found = _improved(_knapsack(sites, budget, unit) or _cheapest(sites), sites, budget)
    candidates = [found, *(u for u in _uniform(sites) if u.cost <= budget)]
    return min(candidates, key=lambda allocation: (allocation.damage, allocation.cost))


def _expect_choices(sites: Mapping[str, Sequence[Choice]]) -> None:
    for site, choices in sites.items():
        if not choices:
            raise UsageError(f"{site}: expected at least one choice; received none.")
        for choice in choices:
            if choice.cost < 0 or not np.isfinite(choice.damage):
                raise UsageError(f"{site}: expected a cost from 0 and a finite damage; received {choice}.")


def _unit(costs: list[int], budget: int) -> int:
    """The size of a cell: what all costs are multiples of, or larger if that makes too many cells."""
    common = gcd(*costs) if any(costs) else 1
    return common if budget // common <= CELLS else -(-budget // CELLS)


def _knapsack(sites: Mapping[str, Sequence[Choice]], budget: int, unit: int) -> Allocation | None:
    """The best allocation when every cost is rounded up to cells; None if even the cheapest no longer fit."""
    cells = budget // unit + 1
    least = np.zeros(cells)  # of damage, for each number of cells that may be used
    picks: list[np.ndarray] = []
    for choices in sites.values():
        options = np.full((len(choices), cells), np.inf)
        for i, choice in enumerate(choices):
            size = -(-choice.cost // unit)
            if size < cells:
                options[i, size:] = least[: cells - size] + choice.damage
        picks.append(options.argmin(axis=0))
        least = options.min(axis=0)
    if not np.isfinite(least[-1]):
        return None
    left, chosen = int(np.argmin(least)), dict[str, Choice]()  # the fewest cells among equals
    for (site, choices), pick in zip(reversed(list(sites.items())), reversed(picks), strict=True):
        chosen[site] = choices[int(pick[left])]
        left -= -(-chosen[site].cost // unit)
    return Allocation({site: chosen[site] for site in sites})


def _cheapest(sites: Mapping[str, Sequence[Choice]]) -> Allocation:
    return Allocation({s: min(choices, key=lambda c: (c.cost, c.damage)) for s, choices in sites.items()})


def _improved(found: Allocation, sites: Mapping[str, Sequence[Choice]], budget: int) -> Allocation:
    """Change one site after the other, the largest gain first, while the budget allows it."""
    while True:
        left = budget - found.cost
        moves = [
            (choice.damage - found.choices[site].damage, choice.cost, site, choice)
            for site, choices in sites.items()
            for choice in choices
            if choice.damage < found.choices[site].damage and choice.cost - found.choices[site].cost <= left
        ]
        if not moves:
            return found
        *_, site, choice = min(moves, key=lambda move: move[:3])
        found = Allocation({**found.choices, site: choice})


def _uniform(sites: Mapping[str, Sequence[Choice]]) -> list[Allocation]:
    """The same format for every site, for each format that all of them offer."""
    offers = [{choice.name: choice for choice in choices} for choices in sites.values()]
    shared = [name for name in offers[0] if all(name in offer for offer in offers)] if offers else []
    return [Allocation({s: offer[name] for s, offer in zip(sites, offers, strict=True)}) for name in shared]
