"""Narrow a program to some of its units: weights, sizes in shapes, ports and tables of all stages, hoisted ones included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..loop.errors import UsageError, nearest
from ..loop.ports import Port
from .analysis.channels import Channels, find_channels
from .analysis.labels import TABLE, Place, varied
from .edit import add_buffer, copy_graph, finish, output_nodes, set_weight
from .program import Program, Stage, attribute
from .shapes import port

aten = torch.ops.aten
Kept = torch.Tensor
"""[labels + 1] whether the channels of each label are kept; the last entry is that of `NOTHING`."""


def narrow(program: Program, keep: Mapping[str, Sequence[int]], channels: Channels | None = None) -> Program:
    """The program with the kept units alone.

    What reads the removed units gets nothing of them, as if their columns were zero. Keeping all of them changes nothing.

    Args:
        program: program in floats.
        keep: numbers of the units to keep, by the name of their group; groups that are not named keep all.
        channels: coupling groups of the program, where they are known already.

    Raises:
        UsageError: there is no such group or unit, or a group would be left empty.
    """
    channels = find_channels(program) if channels is None else channels
    kept = _kept(channels, keep)
    if bool(kept.all()):
        return program
    places: dict[Place, torch.Tensor] = {}
    for group in channels.groups:
        for place, labels in group.places.items():
            places[place] = labels
    for stage in program.stages:
        program = _replaced(program, _Narrowing(stage, channels, kept, places).stage())
    tables = {name: _table(name, table, places, kept) for name, table in program.tables.items()}
    return replace(program, tables=tables)


def _kept(channels: Channels, keep: Mapping[str, Sequence[int]]) -> Kept:
    names = [group.name for group in channels.groups]
    for name in keep:
        if name not in names:
            raise UsageError(
                f"narrow: expected the name of a group of channels; received {name!r}; {nearest(name, names)}"
            )
    most = max((label for group in channels.groups for label in group.units), default=0)
    most = max(most, *(int(labels.max()) for labels in _all(channels.labels.values())), 0)
    kept = torch.ones(most + 2, dtype=torch.bool)
    for name, numbers in keep.items():
        units = channels.named(name).units
        if not numbers or not set(numbers) <= set(range(len(units))):
            raise UsageError(
                f"narrow: group {name}: expected some of its units, 0 to {len(units) - 1}; received {list(numbers)[:8]}. "
                "A layer cannot be left empty: remove the block instead."
            )
        kept[list(units)] = False
        kept[[units[i] for i in numbers]] = True
    return kept


def _all(values: Any) -> list[torch.Tensor]:
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def _table(name: str, table: Any, places: Mapping[Place, torch.Tensor], kept: Kept) -> Any:
    for place, labels in places.items():
        if (place.stage, place.target) == (TABLE, name):
            table = table.take(_positions(labels, kept).numpy(), axis=place.axis)
    return table


def _positions(labels: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The positions along an axis that stay."""
    return kept[labels.long()].nonzero().flatten()


def _replaced(program: Program, changed: Stage) -> Program:
    return program if changed in program.stages else program.with_stage(changed)


class _Narrowing:
    """One stage while it is narrowed."""

    def __init__(self, stage: Stage, channels: Channels, kept: Kept, places: Mapping[Place, torch.Tensor]) -> None:
        self._stage, self._channels, self._kept = stage, channels, kept
        self._places = {place: labels for place, labels in places.items() if place.stage == stage.name}
        self._tables = {place: labels for place, labels in places.items() if place.stage == TABLE}
        self._graph = copy_graph(stage)
        self._twins = dict(zip(stage.graph.graph.nodes, self._graph.graph.nodes, strict=True))

    def stage(self) -> Stage:
        """The narrowed stage; the same where nothing of it changes."""
        changed = [node for node in self._twins if self._changes(node)]
        for node in changed:
            self._rewrite(node)
        for place, labels in self._places.items():
            self._narrow_weight(place, labels)
        if not changed:
            return self._stage
        nodes = self._stage.graph.graph.find_nodes(op="placeholder")
        inputs = tuple(
            replace(declared, shape=self._input_shape(node, declared))
            for node, declared in zip(nodes, self._stage.inputs, strict=True)
        )
        made = finish(replace(self._stage, inputs=inputs), self._graph)
        named = zip(output_nodes(made), self._stage.outputs, strict=True)
        return replace(made, outputs=tuple(port(node, declared.name) for node, declared in named))

    def _input_shape(self, node: fx.Node, declared: Port) -> tuple[int | None, ...]:
        sizes = list(self._shape(node, declared.shape))
        for place, labels in self._tables.items():
            if place.target == declared.name:
                sizes[place.axis] = len(_positions(labels, self._kept))
        return tuple(sizes)

    def _changes(self, node: fx.Node) -> bool:
        labels = self._channels.labels.get(node)
        return labels is not None and any(not bool(self._kept[one.long()].all()) for one in _all([labels]))

    def _shape(self, node: fx.Node, shape: Sequence[int | None], part: int | None = None) -> tuple[int | None, ...]:
        """Sizes of a value, or of a part of it, after narrowing."""
        labels = self._channels.labels.get(node)
        if labels is None:
            return tuple(shape)
        labels = labels if part is None else labels[part]
        along = varied(labels)
        if len(along) != 1:
            return tuple(shape)
        sizes = list(shape)
        sizes[along[0]] = int(self._kept[labels.flatten().long()].sum())
        return tuple(sizes)

    def _rewrite(self, node: fx.Node) -> None:
        """Adapt the sizes that an operator is given."""
        rule = RULES.get(node.target)
        if rule is not None:
            rule(self, node, self._twins[node])
        axis = self._channels.masks.get(node)
        if axis is not None:
            self._narrow_mask(node, axis)

    def _narrow_weight(self, place: Place, labels: torch.Tensor) -> None:
        positions = _positions(labels, self._kept)
        if positions.numel() == labels.numel():
            return
        held = attribute(self._graph, place.target).detach()
        set_weight(self._graph, place.target, held.index_select(place.axis, positions).contiguous())

    def _narrow_mask(self, node: fx.Node, axis: int) -> None:
        """Choose the entries of the heads that are left in a mask with one for each head."""
        twin = self._twins[node]
        labels = self._channels.labels[node]
        positions = _positions(labels.flatten(), self._kept)
        mask = twin.args[3] if len(twin.args) > 3 else twin.kwargs["attn_mask"]
        assert isinstance(mask, fx.Node)
        index = add_buffer(self._graph, f"{node.name}.heads", positions)
        with self._graph.graph.inserting_before(twin):
            chosen = self._graph.graph.call_function(
                aten.index_select.default, (mask, axis, self._graph.graph.get_attr(index))
            )
        twin.replace_input_with(mask, chosen)

    def resize(self, node: fx.Node, twin: fx.Node, at: int, first: int = 0) -> None:
        """Put the new sizes of a result into the argument that lists them, from its dimension `first` on."""
        sizes = list(twin.args[at])  # type: ignore[arg-type]
        old = node.meta["val"].shape
        new = self._shape(node, old)
        for i in range(len(sizes)):
            if new[first + i] != old[first + i] and isinstance(sizes[i], int) and sizes[i] != -1:
                sizes[i] = new[first + i]
        twin.update_arg(at, sizes)

    def resize_parts(self, node: fx.Node, twin: fx.Node) -> None:
        """Split into parts of the sizes that they have after narrowing."""
        dim = int(node.args[2]) if len(node.args) > 2 else int(node.kwargs.get("dim", 0))  # type: ignore[arg-type]
        parts = [value.shape for value in node.meta["val"]]
        sizes = [self._shape(node, shape, i)[dim] for i, shape in enumerate(parts)]
        twin.target = aten.split_with_sizes.default
        twin.args, twin.kwargs = (twin.args[0], sizes, dim), {}

    def resize_range(self, node: fx.Node, twin: fx.Node) -> None:
        """Move the ends of a slice of an axis that is narrowed to where its channels lie now."""
        source, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        assert isinstance(source, fx.Node) and isinstance(dim, int)
        size = source.meta["val"].shape[dim]
        if self._channels.labels[source].shape[dim] > 1:
            ends = slice(start, end).indices(size)[:2]  # type: ignore[arg-type]
            moved = [self._kept_before(source, one) for one in ends]
            twin.args, twin.kwargs = (twin.args[0], dim, *moved, step), {}

    def narrow_range(self, node: fx.Node, twin: fx.Node) -> None:
        """Move a range that is given by its start and length."""
        source, dim, start, length = node.args
        assert isinstance(source, fx.Node) and isinstance(start, int) and isinstance(length, int)
        if self._channels.labels[source].shape[dim] > 1:  # type: ignore[index]
            first, last = self._kept_before(source, start), self._kept_before(source, start + length)
            twin.args = (twin.args[0], dim, first, last - first)

    def _kept_before(self, source: fx.Node, position: int) -> int:
        """How many positions before this one stay, along the axis that is narrowed."""
        return int(self._kept[self._channels.labels[source].flatten()[:position].long()].sum())


def _reshape(narrowing: _Narrowing, node: fx.Node, twin: fx.Node) -> None:
    narrowing.resize(node, twin, 1)


def _unflatten(narrowing: _Narrowing, node: fx.Node, twin: fx.Node) -> None:
    dim = int(node.args[1])  # type: ignore[arg-type]
    narrowing.resize(node, twin, 2, dim % node.args[0].meta["val"].ndim)  # type: ignore[union-attr]


RULES: Mapping[object, Callable[[_Narrowing, fx.Node, fx.Node], None]] = {
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.expand.default: _reshape,
    aten.unflatten.int: _unflatten,
    aten.chunk.default: _Narrowing.resize_parts,
    aten.split.Tensor: _Narrowing.resize_parts,
    aten.split_with_sizes.default: _Narrowing.resize_parts,
    aten.slice.Tensor: _Narrowing.resize_range,
    aten.narrow.default: _Narrowing.narrow_range,
}
"""How operators that hold sizes are told the new ones; other layouts take the sizes that they get."""
