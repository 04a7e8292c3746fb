"""How many units each layer may keep, and what all of them may cost together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.analysis.channels import Channels, Group
from ...ir.cost import program_flops
from ...ir.program import Program
from ...loop.errors import GateError, UsageError
from .layers import Costs, flops_of, parameters_of
from .options import PruneOptions

LEVELS = 12
"""Most widths that are considered for a layer."""


class Amounts:
    """What the options ask of the layers of a program.

    Attributes:
        groups: groups that are narrowed.
    """

    def __init__(self, program: Program, channels: Channels, groups: Sequence[Group], options: PruneOptions) -> None:
        self.groups, self._options = groups, options
        self._program, self._channels = program, channels

    @property
    def nothing(self) -> bool:
        """Whether the options ask for all units."""
        options = self._options
        if options.budget is not None:
            return 1.0 in (options.budget.flops, options.budget.parameters)
        return all(self._share(group) == 1 for group in self.groups)

    def uniform(self) -> dict[str, int]:
        """The same share of every layer of a kind.

        Raises:
            UsageError: a layer would be left empty.
        """
        return {group.name: self._rounded(group, self._share(group)) for group in self.groups}

    def levels(self, group: Group) -> list[int]:
        """Widths that a layer may get, ascending, the whole one last."""
        units, step = len(group.units), self._step(group)
        least = max(step, -(-round(self._options.floor * units) // step) * step)
        every = [*range(min(least, units), units, step)]
        spread = torch.linspace(0, len(every) - 1, min(LEVELS, len(every))).round().long().tolist() if every else []
        return [*(every[i] for i in spread), units]

    def budgets(self) -> list[tuple[list[Group], Costs, int]]:
        """Groups that share a budget, what their units cost, and what all units that are kept may cost.

        Raises:
            UsageError: a layer would be left empty.
            GateError: not even the smallest widths meet the budget.
        """
        budget = self._options.budget
        if budget is None:
            uniform = self.uniform()
            kinds = {group.kind: [other for other in self.groups if other.kind == group.kind] for group in self.groups}
            found = []
            for groups in kinds.values():
                costs = self._costs(groups, "flops")
                spent = sum(costs.of_unit[group.name] * uniform[group.name] for group in groups)
                found.append((groups, costs, spent))
            return found
        what, share = ("flops", budget.flops) if budget.flops is not None else ("parameters", budget.parameters)
        assert share is not None
        costs = self._costs(self.groups, what)
        return [(list(self.groups), costs, self._affordable(costs, share))]

    def _affordable(self, costs: Costs, share: float) -> int:
        """What the kept units may cost together, so that a share of the program is left."""
        fixed = costs.whole - sum(costs.of_unit[group.name] * len(group.units) for group in self.groups)
        least = fixed + sum(costs.of_unit[group.name] * self.levels(group)[0] for group in self.groups)
        if least > share * costs.whole:
            raise GateError(
                f"pass prune: option 'budget': expected a share of {costs.what} that narrower layers can reach; received "
                f"{share:g}, and the closest is {least / costs.whole:.3f}, with {self._options.floor:g} of every layer. "
                "Raise it, lower `floor`, or remove blocks with method depth first."
            )
        return int(share * costs.whole) - fixed

    def _costs(self, groups: Sequence[Group], what: str) -> Costs:
        if what == "flops":
            each = {group.name: flops_of(group, self._channels) for group in groups}
            return Costs(what, each, program_flops(self._program))
        each = {group.name: parameters_of(self._program, group) for group in groups}
        return Costs(what, each, self._program.parameters())

    def _share(self, group: Group) -> float:
        keep = self._options.keep
        if keep is not None:
            return keep.feed_forward if group.kind == "hidden" else keep.heads
        return 1 - self._options.ratio if group.kind == "hidden" else 1.0

    def _step(self, group: Group) -> int:
        return self._options.multiple if group.kind == "hidden" else 1

    def _rounded(self, group: Group, share: float) -> int:
        units, step = len(group.units), self._step(group)
        if share == 1:
            return units
        kept = min(units, round(share * units / step) * step)
        if kept == 0:
            raise UsageError(
                f"pass prune: expected something left of every layer; received {share:.3g} of the {units} "
                f"{'channels' if group.kind == 'hidden' else 'heads'} of {group.name}, which is none in multiples of "
                f"{step}. Keep more of it, skip it, or lower `multiple`."
            )
        return kept
