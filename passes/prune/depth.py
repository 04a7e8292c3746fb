"""Fewer blocks: those whose removal changes the outputs least, by a sum over blocks and then in the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb

import numpy as np

from ...calibration.stage_inputs import step_inputs
from ...ir.analysis.sites.block import find_blocks
from ...ir.analysis.sites.site import Site
from ...ir.cost import program_flops
from ...ir.program import Program, Refusal, Stage, reference
from ...ir.remove import remove_blocks
from ...loop.errors import GateError, UsageError
from ...loop.noise import SampleSet
from ..base import Context, PassResult
from ..quantize.algebra.allocation import Choice, allocate
from ..quantize.sensitivity import SampleDrift
from .options import PruneOptions

EVALUATIONS = 8
"""Evaluations of the loop whose outputs a block is scored by."""
SAMPLES = 4
TRIED = 100
"""Most selections of blocks that are all tried in the loop: those of up to 8 blocks, for one."""

Selection = tuple[str, ...]


@dataclass(frozen=True)
class Unit:
    """A block that can be removed.

    Attributes:
        site: its nodes.
        cost: what the program costs less without it.
        damage: mean square change of the prediction without it.
    """

    site: Site
    cost: int
    damage: float


def prune_depth(program: Program, options: PruneOptions, context: Context) -> PassResult:
    """The program without the blocks that matter least (LAPTOP-Diff, arXiv 2404.11098).

    Raises:
        UsageError: the ratio leaves no block.
        GateError: no selection of blocks meets the budget.
    """
    if options.budget is None and options.ratio == 0:
        return PassResult(program, 0, identity=True)
    units, refused = _units(program, context, options)
    if not units:
        return PassResult(program, 0, tuple(refused))
    first = _knapsack(program, units, options)
    drift = SampleDrift(program, context)
    found = _best(program, units, first, options, drift)
    if not found:
        return PassResult(program, 0, tuple(refused), identity=True)
    details = {
        "method": "depth",
        "removed": list(found),
        "damage": {name: unit.damage for name, unit in units.items()},
        "drift": drift.of(_removed(program, units, found)),
        "drift of the knapsack": drift.of(_removed(program, units, first)),
    }
    return PassResult(_removed(program, units, found), len(found), tuple(refused), details=details)


def _units(program: Program, context: Context, options: PruneOptions) -> tuple[dict[str, Unit], list[Refusal]]:
    """The blocks that can be removed, each with the change of the prediction without it."""
    recorded = step_inputs(program, SampleSet("calibration", context.seed, SAMPLES), EVALUATIONS, context.progress)
    whole = _predictions(program.step, recorded)
    units, refused = dict[str, Unit](), list[Refusal]()
    sites = find_blocks(program.step.graph.graph).sites
    for i, site in enumerate(sites):
        context.progress("scoring blocks", i, len(sites))
        smaller = remove_blocks(program, [site.nodes])
        if isinstance(smaller, Refusal):
            refused.append(Refusal(site.name, f"at {smaller.site}: {smaller.reason}"))
            continue
        change = _predictions(smaller.step, recorded) - whole
        units[site.name] = Unit(
            site, _cost(program, options) - _cost(smaller, options), float(np.square(change).mean())
        )
    return units, refused


def _predictions(stage: Stage, recorded: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """[E, B, ...] what a stage computes of the recorded inputs."""
    call = reference(stage)
    return np.stack([call(inputs)[0] for inputs in recorded])


def _cost(program: Program, options: PruneOptions) -> int:
    """What the budget counts: FLOPs, weights, or blocks that are kept."""
    if options.budget is not None and options.budget.parameters is not None:
        return program.parameters()
    return program_flops(program)


def _knapsack(program: Program, units: Mapping[str, Unit], options: PruneOptions) -> Selection:
    """The blocks to remove of least added damage, as many as the ratio says or as the budget wants."""
    if options.budget is None:
        total = len(find_blocks(program.step.graph.graph).sites)
        count = round(options.ratio * total)
        if count > len(units) or count == total:
            raise UsageError(
                f"pass prune: option 'ratio': expected a block left of {total}, of which {len(units)} can be removed; "
                f"received {options.ratio:g}, which are {count}. Lower it."
            )
        one_each = {name: replace(unit, cost=1) for name, unit in units.items()}
        return affordable(one_each, len(units) - count)
    share = options.budget.flops if options.budget.flops is not None else options.budget.parameters
    assert share is not None
    whole = _cost(program, options)
    fixed = whole - sum(unit.cost for unit in units.values())
    least = fixed + min(unit.cost for unit in units.values())
    if least > share * whole:
        what = "FLOPs" if options.budget.flops is not None else "parameters"
        raise GateError(
            f"pass prune: option 'budget': expected a share of {what} that removing all blocks but one can reach; received "
            f"{share:g}, and the closest is {least / whole:.3f}. Raise it, or narrow the layers with method width."
        )
    return affordable(units, int(share * whole) - fixed)


def affordable(units: Mapping[str, Unit], limit: int) -> Selection:
    """The blocks to remove of least added damage, so that those that stay cost at most a limit; exact."""
    choices = {n: [Choice("keep", u.cost, 0.0), Choice("remove", 0, u.damage)] for n, u in units.items()}
    chosen = allocate(choices, limit).choices
    return tuple(name for name in units if chosen[name].name == "remove")


def _best(
    program: Program, units: Mapping[str, Unit], first: Selection, options: PruneOptions, drift: SampleDrift
) -> Selection:
    """The selection whose samples drift least: of all of this size where they are few, else by swaps from the knapsack's."""
    saved = sum(units[name].cost for name in first) if options.budget is not None else 0
    if comb(len(units), len(first)) <= TRIED:
        every = (one for one in combinations(units, len(first)) if sum(units[name].cost for name in one) >= saved)
        return min(every, key=lambda one: drift.of(_removed(program, units, one)))
    best, least = first, drift.of(_removed(program, units, first))
    for swapped in _swaps(units, first, saved):
        found = drift.of(_removed(program, units, swapped))
        if found < least:
            best, least = swapped, found
    return best


def _swaps(units: Mapping[str, Unit], first: Selection, saved: int) -> list[Selection]:
    """The selections that differ in one block, those of least added damage first, `TRIED` at most."""
    others = [name for name in units if name not in first]
    swapped = [tuple(n for n in units if (n in first and n != old) or n == new) for old in first for new in others]
    allowed = [one for one in swapped if sum(units[name].cost for name in one) >= saved]
    return sorted(allowed, key=lambda one: sum(units[name].damage for name in one))[:TRIED]


def _removed(program: Program, units: Mapping[str, Unit], names: Selection) -> Program:
    made = remove_blocks(program, [units[name].site.nodes for name in names])
    assert isinstance(made, Program), "blocks that can be removed alone can be removed together"
    return made
