"""The layers of a program that `prune` narrows, with what their units cost and how much they matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import fx

from ...ir.analysis.channels import Channels, Group
from ...ir.analysis.labels import SDPA
from ...ir.cost import flops
from ...ir.program import Program, Refusal, attribute
from ...ir.shapes import PROBE_BATCHES
from ...loop.errors import UsageError
from .compensate import Layer
from .criteria.criterion import Criterion
from .moments import Moments
from .options import PruneOptions


def chosen_groups(
    program: Program, channels: Channels, options: PruneOptions
) -> tuple[tuple[Group, ...], tuple[Refusal, ...]]:
    """The groups that a recipe narrows, and every other with the reason.

    Raises:
        UsageError: a pattern names no group.
    """
    names = [group.name for group in channels.groups]
    _require_matches(options, names)
    computing = {node for stage in program.steps for node in stage.graph.graph.nodes}
    groups, refused = [], list(channels.refused)
    for group in channels.groups:
        reason = _refusal(group, options, computing)
        if reason is None:
            groups.append(group)
        else:
            refused.append(Refusal(group.name, reason))
    return tuple(groups), tuple(refused)


def _refusal(group: Group, options: PruneOptions, computing: set[fx.Node]) -> str | None:
    if not any(fnmatchcase(group.name, pattern) for pattern in options.include):
        return "not included"
    if any(fnmatchcase(group.name, pattern) for pattern in options.skip):
        return "skipped by the recipe"
    if not computing.issuperset(group.readers):
        return "it runs once a request, so that its removal saves nothing at an evaluation"
    return None


def _require_matches(options: PruneOptions, names: Sequence[str]) -> None:
    for option, patterns in (("include", options.include), ("skip", options.skip)):
        for pattern in patterns if names else ():
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.0)
                raise UsageError(
                    f"pass prune: option {option!r}: expected patterns of feed-forward layers and attentions of the model; "
                    f"received {pattern!r}, which matches none. The nearest: {', '.join(near)}."
                )


def layer_of(program: Program, node: fx.Node) -> Layer:
    """The weights of a linear layer in float64."""
    graph = next(stage.graph for stage in program.stages if stage.graph.graph is node.graph)
    weight, bias = (*node.args, None)[1:3]
    held = [
        attribute(graph, str(one.target)).detach().double() if isinstance(one, fx.Node) else None
        for one in (weight, bias)
    ]
    assert held[0] is not None
    return Layer(held[0], held[1])


def unit_scores(
    program: Program, group: Group, criterion: Criterion, moments: Mapping[fx.Node, Moments]
) -> torch.Tensor:
    """[units] the scores of all columns of each unit, added up over the layers that read them."""
    scores = torch.zeros(len(group.units), dtype=torch.float64)
    for reader in group.readers:
        columns = criterion.scores(layer_of(program, reader).weight, moments.get(reader))
        units = group.columns(reader)
        scores.index_add_(0, units[units >= 0], columns[units >= 0])
    return scores


@dataclass(frozen=True)
class Costs:
    """What one unit of each group costs, and the whole program.

    Attributes:
        what: is counted, for messages.
        of_unit: cost of one unit, by the name of the group.
        whole: cost of the program as it is.
    """

    what: str
    of_unit: Mapping[str, int]
    whole: int


def flops_of(group: Group, channels: Channels) -> int:
    """FLOPs of one unit at each evaluation, for one sample."""
    total = 0
    for layers, units_of in ((group.writers, group.rows), (group.readers, group.columns)):
        for layer in layers:
            units = units_of(layer)
            total += flops(layer) * int((units == 0).sum()) // len(units)
    for node, labels in channels.labels.items():
        if node.target is SDPA and bool((labels == group.units[0]).any()):
            total += flops(node) // len(group.units)
    return total // PROBE_BATCHES[0]


def parameters_of(program: Program, group: Group) -> int:
    """Weights of one unit."""
    total = 0
    for place in group.places:
        stage = next((stage for stage in program.stages if stage.name == place.stage), None)
        if stage is not None:
            size = attribute(stage.graph, place.target).numel()
            total += size * int((group.positions(place) == 0).sum()) // len(group.places[place])
    return total


@dataclass(frozen=True)
class Weighted:
    """A group with the scores of its units.

    Attributes:
        group: what is narrowed.
        scores: [units].
    """

    group: Group
    scores: torch.Tensor

    def best(self, count: int) -> list[int]:
        """The numbers of the units of largest score, ascending; of equals, the first."""
        order = torch.argsort(self.scores, descending=True, stable=True)
        return sorted(order[:count].tolist())
