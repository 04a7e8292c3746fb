"""Narrower layers: which units go, from which layer, and what the rest gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from ...ir.analysis.channels import Channels, Group, find_channels
from ...ir.edit import copy_graph, set_weight
from ...ir.narrow import narrow
from ...ir.program import Program, Refusal
from ..base import Context, PassResult
from ..quantize.algebra.allocation import Choice, allocate
from ..quantize.sensitivity import SampleDrift
from .amounts import Amounts
from .compensate import Layer, least_squares, lost, with_mean, without
from .criteria import CRITERIA
from .layers import Costs, Weighted, chosen_groups, layer_of, unit_scores
from .moments import known_moments
from .options import PruneOptions

MEASURED = 0.75
"""Share of its units that a layer keeps while its sensitivity is measured."""

Widths = Mapping[str, int]
"""Kept units by the name of their group."""


def prune_width(program: Program, options: PruneOptions, context: Context) -> PassResult:
    """The program with narrower feed-forward layers and fewer heads.

    Raises:
        UsageError: a pattern names no layer, a layer would be left empty, or the store is of another program.
        GateError: no widths meet the budget.
    """
    channels = find_channels(program)
    groups, refused = chosen_groups(program, channels, options)
    amounts = Amounts(program, channels, groups, options)
    if not groups or amounts.nothing:
        return PassResult(program, 0, refused, identity=bool(groups))
    width = _Width(program, channels, amounts, options, context)
    widths = width.widths()
    keep = width.keep(widths)
    made = narrow(width.fitted(keep), keep)
    narrowed = {group.name: widths[group.name] for group in groups if widths[group.name] < len(group.units)}
    details = {
        "method": "width",
        "criterion": options.criterion,
        "compensate": options.compensate,
        "kept": {group.name: f"{widths[group.name]} of {len(group.units)}" for group in groups},
        **width.decided,
    }
    return PassResult(made, len(narrowed), (*refused, *width.refused(narrowed)), details=details)


class _Width:
    """Decides on widths and fits the layers that read what is left.

    Attributes:
        decided: what was found out on the way, for the record.
    """

    def __init__(
        self, program: Program, channels: Channels, amounts: Amounts, options: PruneOptions, context: Context
    ) -> None:
        self._program, self._channels, self._amounts = program, channels, amounts
        self._options, self._context = options, context
        self.decided: dict[str, object] = {}
        criterion = CRITERIA[options.criterion]
        self._readers = tuple(dict.fromkeys(reader for group in amounts.groups for reader in group.readers))
        self._layers = {reader: layer_of(program, reader) for reader in self._readers}
        needed = criterion.reads_moments or options.compensate != "none"
        self._moments = known_moments(program, self._readers, context) if needed else {}
        self._weighted = {
            group.name: Weighted(group, unit_scores(program, group, criterion, self._moments))
            for group in amounts.groups
        }

    def widths(self) -> Widths:
        """Units to keep of each layer.

        By sensitivity a knapsack spends the budget; where samples drift less with the same share for all, that is taken.
        """
        if self._options.distribute == "uniform":
            return self._amounts.uniform()
        drift, found = SampleDrift(self._program, self._context), dict[str, int]()
        for groups, costs, budget in self._amounts.budgets():
            found |= self._spent(groups, costs, budget, drift)
        if self._options.budget is not None:
            return found
        candidates = {"by sensitivity": found, "uniform": self._amounts.uniform()}
        drifts = {name: drift.of(self.fitted(self.keep(widths))) for name, widths in candidates.items()}
        self.decided["drift"] = drifts
        return candidates[min(drifts, key=drifts.__getitem__)]

    def _spent(self, groups: Sequence[Group], costs: Costs, budget: int, drift: SampleDrift) -> Widths:
        """Widths of least damage whose units cost no more than a budget."""
        if budget >= sum(costs.of_unit[group.name] * len(group.units) for group in groups):
            return {group.name: len(group.units) for group in groups}
        choices = dict[str, list[Choice]]()
        for i, group in enumerate(groups):
            self._context.progress("measuring sensitivity", i, len(groups))
            choices[group.name] = [
                Choice(str(count), count * costs.of_unit[group.name], damage)
                for count, damage in self._damages(group, drift).items()
            ]
        return {name: int(choice.name) for name, choice in allocate(choices, budget).choices.items()}

    def keep(self, widths: Widths) -> dict[str, list[int]]:
        """The units of largest score."""
        return {name: self._weighted[name].best(count) for name, count in widths.items()}

    def fitted(self, keep: Mapping[str, Sequence[int]]) -> Program:
        """The program of full width whose layers read the kept units alone and make up for the others."""
        return with_layers(self._program, {reader: self._fit(reader, keep) for reader in self._readers})

    def refused(self, narrowed: Widths) -> list[Refusal]:
        """The narrowed layers that could not be fitted as asked."""
        if self._options.compensate != "least-squares":
            return []
        return [
            Refusal(name, "fitted by means: the store has no Gram matrix of what reads it, or of too few rows")
            for name in narrowed
            if any(self._moments[reader].gram is None for reader in self._weighted[name].group.readers)
        ]

    def _fit(self, reader: fx.Node, keep: Mapping[str, Sequence[int]]) -> Layer:
        layer, moments = self._layers[reader], self._moments.get(reader)
        kept = torch.ones(layer.weight.shape[1], dtype=torch.bool)
        for name, units in keep.items():
            group = self._weighted[name].group
            if reader in group.readers:
                numbers = group.columns(reader)
                kept &= (numbers < 0) | torch.isin(numbers, torch.tensor(list(units)))
        if self._options.compensate == "none" or moments is None:
            return without(layer, kept)
        if self._options.compensate == "mean" or moments.gram is None:
            return with_mean(layer, kept, moments)
        return least_squares(layer, kept, moments)

    def _damages(self, group: Group, drift: SampleDrift) -> dict[int, float]:
        """Squared drift of samples at each width: measured at one, and as errors of outputs have it at the others."""
        widths = self._amounts.levels(group)
        errors = [self._error(group, count) for count in widths]
        at = min(range(len(widths) - 1), key=lambda i: abs(widths[i] - MEASURED * len(group.units)), default=0)
        measured = drift.of(self.fitted(self.keep({group.name: widths[at]}))) ** 2
        scale = measured / errors[at] if errors[at] > 0 else 0.0
        return {count: scale * error for count, error in zip(widths, errors, strict=True)}

    def _error(self, group: Group, count: int) -> float:
        keep = self.keep({group.name: count})
        if all(reader in self._moments and self._moments[reader].gram is not None for reader in group.readers):
            return sum(
                lost(self._layers[reader], self._fit(reader, keep), self._moments[reader]) for reader in group.readers
            )
        weighted = self._weighted[group.name]
        return float(weighted.scores.sum() - weighted.scores[keep[group.name]].sum())


def with_layers(program: Program, layers: Mapping[fx.Node, Layer]) -> Program:
    """The program with other weights in its linear layers."""
    for stage in program.stages:
        own = {node: layer for node, layer in layers.items() if node.graph is stage.graph.graph}
        if own:
            graph = copy_graph(stage)
            for node, layer in own.items():
                for argument, tensor in zip(node.args[1:3], (layer.weight, layer.bias), strict=False):
                    if isinstance(argument, fx.Node) and tensor is not None:
                        set_weight(graph, str(argument.target), tensor.float())
            program = program.with_stage(replace(stage, graph=graph))
    return program
