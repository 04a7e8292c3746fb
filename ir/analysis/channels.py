"""Coupling groups: which rows, columns and entries of stored tensors can only be removed together.

A channel of a feed-forward layer is a row of the layer before the activation, or one of each half of a gated one, and a
column of the layer after it. An attention head is K rows of query, key and value and K columns of what reads the heads,
wherever these lie: in several linear layers of joint attention, in a stage that runs once a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx

from ..names import module_path
from ..program import Program, Refusal
from .labels import (
    NOTHING,
    SDPA,
    TOKEN_RANK,
    Labels,
    Meeting,
    Place,
    compact,
    constant_place,
    merged,
    numbered,
    run,
    varied,
)
from .sites.walk import LINEAR, described

Kind = Literal["hidden", "heads"]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that each can be removed, everywhere at once.

    Attributes:
        name: module path that all its layers share, made unique by a counter.
        kind: `hidden` channels of a feed-forward layer, or attention `heads`.
        units: labels of the units, in the order of the first layer that writes them.
        places: [size] the label of each position along each axis that holds units.
        writers: linear layers with a row for each unit, or several.
        readers: linear layers with a column for each unit, or several.
    """

    name: str
    kind: Kind
    units: tuple[int, ...]
    places: Mapping[Place, torch.Tensor]
    writers: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]

    def positions(self, place: Place) -> torch.Tensor:
        """[size] the number of the unit at each position of an axis, -1 for those of no unit of the group."""
        numbers = {unit: i for i, unit in enumerate(self.units)}
        return torch.tensor([numbers.get(label, NOTHING) for label in self.places[place].tolist()])

    def columns(self, reader: fx.Node) -> torch.Tensor:
        """[M] the number of the unit in each column of a layer that reads it, -1 for those of no unit of the group."""
        return next(self.positions(place) for place in self.places if place.axis == 1 and _holds(place, reader))

    def rows(self, writer: fx.Node) -> torch.Tensor:
        """[N] the number of the unit in each row of a layer that writes it, -1 for those of no unit of the group."""
        return next(self.positions(place) for place in self.places if place.axis == 0 and _holds(place, writer))


@dataclass(frozen=True, eq=False)
class Channels:
    """What of a program can be narrowed.

    Attributes:
        groups: coupling groups, in the order in which their labels were given.
        refused: feed-forward layers and attentions whose units cannot be followed, with the node.
        labels: labels of each value, sizes of 1 where they repeat; of an operator with several results, a list.
        masks: attention masks with an entry for each head: the attention -> the axis of the mask.
    """

    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...]
    labels: Mapping[fx.Node, Any]
    masks: Mapping[fx.Node, int] = field(default_factory=dict)

    def named(self, name: str) -> Group:
        """The group of this name; raises KeyError."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}


def find_channels(program: Program) -> Channels:
    """The coupling groups of all stages of a program in floats."""
    first = numbered(program)
    count = sum(labels.numel() for labels in first.values())
    seen = run(program, first, keep=False)
    whole = merged(seen.pairs, count)
    second = {place: whole[labels.long()] for place, labels in first.items()}
    return _Assembly(program, run(program, second, keep=True), count).channels()


class _Assembly:
    """Groups out of labels that are the same wherever units belong together."""

    def __init__(self, program: Program, found: Labels, count: int) -> None:
        self._program, self._found = program, found
        self._stages = {node: stage for stage in program.stages for node in stage.graph.graph.nodes}
        self._stops: list[tuple[torch.Tensor, Refusal]] = list(found.stopped)
        self._stopped = torch.zeros(count, dtype=torch.bool)
        self._places, self._masks = dict(found.places), dict[fx.Node, int]()

    def channels(self) -> Channels:
        """Check every value and every meeting, then put labels of equal places into groups."""
        for node, labels in self._found.values.items():
            for one in labels if isinstance(labels, list | tuple) else [labels]:
                along = varied(one)
                if len(along) > 1:
                    self._stop(one, node, "its channels do not lie along one axis")
                if not along:
                    self._stop(one, node, "it holds a single unit, or all as one")
        for meeting in self._found.meetings:
            self._meet(meeting)
        self._check_readers()
        for labels, _ in self._stops:
            self._stopped[labels.long()] = True
        groups = self._groups()
        return Channels(groups, self._refused(groups), self._found.values, self._masks)

    def _stop(self, labels: torch.Tensor, node: fx.Node, reason: str) -> None:
        self._stops.append((labels[labels != NOTHING].unique(), Refusal(node.name, reason)))

    def _meet(self, meeting: Meeting) -> None:
        """A value without labels is the same for all units, or a constant with an entry for each of them."""
        along, labels, node = varied(meeting.labels), meeting.labels, meeting.node
        if all(meeting.shape[dim] == 1 for dim in along):
            return
        axis = along[0] - (labels.ndim - meeting.other.meta["val"].ndim)
        if len(along) == 1 and node.target is SDPA:
            self._masks[node] = axis
            return
        place = constant_place(self._program, self._stages[node], meeting.other, axis)
        if len(along) > 1 or place is None:
            self._stop(labels, node, f"it is combined with {described(meeting.other)}, which no linear layer writes")
            return
        entries = compact(labels).flatten().expand(meeting.shape[along[0]])
        known = self._places.setdefault(place, entries)
        if not torch.equal(known, entries):
            self._stop(known, node, "a weight is shared by different channels")
            self._stop(entries, node, "a weight is shared by different channels")

    def _check_readers(self) -> None:
        """A weight is read by those operators only that were followed."""
        followed = {(meeting.other, meeting.node) for meeting in self._found.meetings}
        for place, labels in self._places.items():
            for held in self._held(place):
                for user in held.users:
                    as_weight = user.target is LINEAR and user.args[1] is held
                    if not as_weight and (held, user) not in followed:
                        self._stop(labels, user, f"{place.target} is read by an operator that is not followed")

    def _held(self, place: Place) -> Iterable[fx.Node]:
        for stage in self._program.stages:
            if stage.name == place.stage:
                nodes = stage.graph.graph.find_nodes(op="get_attr")
                yield from (node for node in nodes if node.target == place.target)

    def _groups(self) -> tuple[Group, ...]:
        holding: dict[int, list[Place]] = {}
        for place, labels in self._places.items():
            for label in labels.unique().tolist():
                if label != NOTHING and not self._stopped[label]:
                    holding.setdefault(label, []).append(place)
        together: dict[tuple[Place, ...], list[int]] = {}
        for label, places in sorted(holding.items()):
            together.setdefault(tuple(sorted(places)), []).append(label)
        found = [self._group(places, units) for places, units in together.items() if len(units) > 1]
        return _uniquely_named(group for group in found if group is not None)

    def _group(self, places: Sequence[Place], units: Sequence[int]) -> Group | None:
        writers = self._layers(place for place in places if place.axis == 0)
        readers = self._layers(place for place in places if place.axis == 1)
        kind = self._kind(units[0], readers)
        if kind is None or not writers or not readers:
            return None
        held = {place: self._places[place] for place in places}
        return Group(_shared_path([*writers, *readers]), kind, tuple(units), held, writers, readers)

    def _layers(self, places: Iterable[Place]) -> tuple[fx.Node, ...]:
        return tuple(dict.fromkeys(node for place in places for node in self._found.rows.get(place, ())))

    def _kind(self, unit: int, readers: Sequence[fx.Node]) -> Kind | None:
        if any(unit in labels for labels in self._found.attended):
            return "heads"
        on_tokens = all(reader.meta["val"].ndim >= TOKEN_RANK for reader in readers)
        return "hidden" if on_tokens and any(unit in labels for labels in self._found.activated) else None

    def _refused(self, groups: Sequence[Group]) -> tuple[Refusal, ...]:
        """The layers that write into an activation or an attention and belong to no group."""
        known = {writer for group in groups for writer in group.writers}
        unproven: dict[Refusal, list[fx.Node]] = {}
        for place, writers in self._found.rows.items():
            labels = self._places[place]
            on_tokens = writers[0].meta["val"].ndim >= TOKEN_RANK
            if place.axis == 0 and on_tokens and not known & set(writers) and self._is_used(labels):
                unproven.setdefault(self._reason(labels, writers[0]), []).extend(writers)
        return tuple(Refusal(_shared_path(writers), why.reason) for why, writers in unproven.items())

    def _is_used(self, labels: torch.Tensor) -> bool:
        return any(bool(torch.isin(labels, used).any()) for used in (*self._found.activated, *self._found.attended))

    def _reason(self, labels: torch.Tensor, writer: fx.Node) -> Refusal:
        for stopped, refusal in self._stops:
            if torch.isin(labels, stopped).any():
                return Refusal(refusal.site, f"at {refusal.site}: {refusal.reason}")
        return Refusal(writer.name, f"at {writer.name}: no stored linear layer reads its units one by one")


def _holds(place: Place, layer: fx.Node) -> bool:
    weight = layer.args[1]
    return isinstance(weight, fx.Node) and weight.target == place.target


def _shared_path(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that holds all nodes."""
    paths = [module_path(node).split(".") for node in nodes]
    shared = [parts[0] for parts in zip(*paths, strict=False)]
    for i, parts in enumerate(zip(*paths, strict=False)):
        if len(set(parts)) > 1:
            return ".".join(shared[:i]) or ".".join(paths[0])
    return ".".join(shared)


def _uniquely_named(groups: Iterable[Group]) -> tuple[Group, ...]:
    seen, found = dict[str, int](), []
    for group in groups:
        seen[group.name] = count = seen.get(group.name, 0) + 1
        found.append(group if count == 1 else replace(group, name=f"{group.name}#{count}"))
    return tuple(found)
