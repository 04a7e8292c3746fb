"""Bits for each site: the format of each group by what it costs and by what it does to samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ....ir.program import Program
from ....loop.errors import GateError
from ..algebra.allocation import Allocation, Choice, allocate
from ..durations import Durations
from ..inputs import Inputs, Need
from ..layers import Group, LinearLayer
from ..realize import Realization
from ..rewrite import replaced
from ..scheme import Scheme
from ..sensitivity import SampleDrift
from .blocks import Int4
from .int8 import Int8

if TYPE_CHECKING:
    from ...base import Context
    from ..options import QuantizeOptions

FLOAT, FLOAT_BITS = "float", 32


@dataclass(frozen=True)
class Budget:
    """What formats cost, and how much of the cost of floats may be spent.

    Attributes:
        option: option of `quantize` that sets it.
        what: is counted, for messages.
        share: share of the cost that all layers have in floats.
        unit: what the whole cost is in the unit of the option.
        costs: cost of each format, by the key of a group.
    """

    option: str
    what: str
    share: float
    unit: float
    costs: Mapping[str, Mapping[str, int]]

    @property
    def floats(self) -> int:
        """The cost of all layers in floats."""
        return sum(costs[FLOAT] for costs in self.costs.values())

    @property
    def limit(self) -> int:
        """The largest cost that is allowed."""
        return int(self.share * self.floats)


class Mixed(Scheme):
    """4, 8 or 32 bits for each site: least change of samples within an average number of bits, or within a time.

    The sensitivity of a site to a format is the drift of the samples of a short loop in which it alone is quantized.
    Squared drifts are added up and spent by a knapsack; every uniform choice within the budget is tried in the loop
    too, and the best of all is taken, so that a mixture is never worse than what it is mixed from.
    """

    name = "mixed"
    source = "Knapsack over measured sensitivities, section 4 of LAPTOP-Diff (arXiv 2404.11098) for formats"
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "bits": (),
        "time": (),
        "group": (),
        "activations": ("dynamic", "static"),
        "smooth": Int8.reads["smooth"],
    }

    def __init__(self, options: QuantizeOptions):
        super().__init__(options)
        shared = {"activations": options.activations, "smooth": options.smooth}
        self._int8 = Int8(type(options)(scheme="int8", **shared))
        self._int4 = Int4(type(options)(scheme="int4", rounding="gptq", group=options.group))
        self._chosen: Mapping[str, Realization | None] = {}

    @property
    def need(self) -> Need:
        """See `Scheme.need`."""
        return Need.STATISTICS

    def unfit(self, layer: LinearLayer) -> str | None:
        """See `Scheme.unfit`."""
        return self._int4.unfit(layer)

    def scale(self, group: Group, inputs: Inputs) -> torch.Tensor | None:
        """See `Scheme.scale`."""
        return self._int8.scale(group, inputs)

    def prepare(
        self, program: Program, groups: Sequence[Group], inputs: Mapping[str, Inputs], context: Context
    ) -> Mapping[str, object]:
        """Measure every group in every format, then spend the bits or the time."""
        kinds = {"int8": self._int8, "int4": self._int4}
        realized: dict[str, dict[str, Realization | None]] = {
            group.key: {
                FLOAT: None,
                **{name: kind.realize(group, inputs[group.key]) for name, kind in kinds.items()},
            }
            for group in groups
        }
        budget = self._budget(groups, realized, context)
        drift = SampleDrift(program, context)
        choices: dict[str, list[Choice]] = {}
        for i, group in enumerate(groups):
            context.progress("measuring sensitivity", i, len(groups))
            choices[group.key] = [
                Choice(name, budget.costs[group.key][name], _damage(drift, program, group, item))
                for name, item in realized[group.key].items()
            ]
        found = self._best(drift, program, groups, realized, _candidates(choices, budget))
        self._chosen = {key: realized[key][choice.name] for key, choice in found.choices.items()}
        formats = {group.key: found.choices[group.key].name for group in groups}
        bits = sum(_bits(group, formats[group.key], self._int4) for group in groups)
        spent = {} if self.options.time is None else {"time": found.cost / budget.floats}
        return {
            "bits": bits / sum(group.weight.numel() for group in groups),
            **spent,
            "formats": {group.name: formats[group.key] for group in groups},
        }

    def _budget(
        self, groups: Sequence[Group], realized: Mapping[str, Mapping[str, Realization | None]], context: Context
    ) -> Budget:
        """What formats cost and what may be spent: nanoseconds on the engine, or bits of weights."""
        if self.options.time is None:
            names = next(iter(realized.values()))
            costs = {group.key: {name: _bits(group, name, self._int4) for name in names} for group in groups}
            return Budget("bits", "bits a weight", self.options.bits / FLOAT_BITS, FLOAT_BITS, costs)
        durations, costs = Durations(context), {}
        for i, group in enumerate(groups):
            context.progress("measuring durations", i, len(groups))
            costs[group.key] = durations.of(group, realized[group.key])
        return Budget("time", "of the time of layers in floats", self.options.time, 1, costs)

    def realize(self, group: Group, inputs: Inputs | None) -> Realization | None:
        """See `Scheme.realize`."""
        return self._chosen[group.key]

    @staticmethod
    def _best(
        drift: SampleDrift,
        program: Program,
        groups: Sequence[Group],
        realized: Mapping[str, Mapping[str, Realization | None]],
        candidates: Sequence[Allocation],
    ) -> Allocation:
        """The candidate whose samples drift least, the first of equals."""

        def measured(allocation: Allocation) -> float:
            items = [realized[group.key][allocation.choices[group.key].name] for group in groups]
            return drift.of(replaced(program, groups, items))

        return min(candidates, key=measured)


def _damage(drift: SampleDrift, program: Program, group: Group, realization: Realization | None) -> float:
    """Squared drift of the samples where a group alone is replaced; none where it stays in floats."""
    return 0.0 if realization is None else drift.of(replaced(program, [group], [realization])) ** 2


def _bits(group: Group, format: str, int4: Int4) -> int:
    """Bits of the weights of a group, scales included."""
    N, M = group.weight.shape
    if format == FLOAT:
        return FLOAT_BITS * N * M
    if format == "int8":
        return 8 * N * M + FLOAT_BITS * N
    return round(int4.grid(M).bits_per_weight(N, M) * N * M)


def _candidates(choices: Mapping[str, Sequence[Choice]], budget: Budget) -> list[Allocation]:
    """The allocation of the knapsack, and each format for all sites that the budget allows."""
    least = sum(min(choice.cost for choice in listed) for listed in choices.values())
    if least > budget.limit:
        raise GateError(
            f"quantize: {budget.option}: expected at least {budget.unit * least / budget.floats:.2f} {budget.what}, "
            f"which is the cheapest format at every site; received {budget.unit * budget.share:.2f}. Raise it."
        )
    found = [allocate(choices, budget.limit)]
    for place in range(len(next(iter(choices.values())))):
        uniform = Allocation({key: listed[place] for key, listed in choices.items()})
        if uniform.cost <= budget.limit:
            found.append(uniform)
    return found
