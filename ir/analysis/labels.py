"""Labels of channels that flow through the graphs of a program.

Every output of every stored linear layer gets a number. The numbers run through the graphs in place of the values:
through layouts by running the layouts on them, and where an operator reads two labelled values, the numbers that meet
must be kept or removed together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..program import Program, Refusal, Stage, attribute
from .sites.walk import ACTIVATIONS, ELEMENTWISE, LINEAR, NORMS, constant_values, described, is_size, rearranges

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default})
NOTHING = -1
"""The label of a channel that no stored linear layer writes."""
TABLE = ""
"""What stands for the stage in places of tables."""
MASK = 3
"""Which argument of an attention is its mask."""
TOKEN_RANK = 3
"""[B, T, D]; an embedding of the timestep [B, D] has the form of a feed-forward layer and is none."""


@dataclass(frozen=True, order=True)
class Place:
    """An axis of a stored tensor.

    Attributes:
        stage: name of the stage, or `TABLE`.
        target: attribute of the stage that holds the tensor, or the name of a table.
        axis: number of the axis.
    """

    stage: str
    target: str
    axis: int


@dataclass(frozen=True, eq=False)
class Meeting:
    """A labelled value that an operator combines with a value without labels.

    Attributes:
        node: the operator.
        labels: labels of the labelled value, in as many dimensions as the result.
        other: the value without labels.
        shape: sizes of the other value, aligned with those of the labels from the right.
    """

    node: fx.Node
    labels: torch.Tensor
    other: fx.Node
    shape: tuple[int, ...]


@dataclass
class Labels:
    """What one run of the labels has found.

    Attributes:
        values: labels of each value, sizes of 1 where they repeat; of an operator with several results, a list.
        places: labels along each labelled axis of a weight.
        pairs: pairs [2, n] of labels that met.
        meetings: labelled values that met values without labels.
        stopped: labels that reached an operator they cannot pass, with the node and why.
        attended: labels that reached an attention.
        activated: labels that reached an activation of tokens.
        rows: linear layers whose outputs each weight makes, and that read each weight's columns.
    """

    values: dict[fx.Node, Any] = field(default_factory=dict)
    places: dict[Place, torch.Tensor] = field(default_factory=dict)
    pairs: list[torch.Tensor] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    stopped: list[tuple[torch.Tensor, Refusal]] = field(default_factory=list)
    attended: list[torch.Tensor] = field(default_factory=list)
    activated: list[torch.Tensor] = field(default_factory=list)
    rows: dict[Place, list[fx.Node]] = field(default_factory=dict)


def numbered(program: Program) -> dict[Place, torch.Tensor]:
    """[N] a label of its own for every output of every stored linear layer."""
    found, first = dict[Place, torch.Tensor](), 0
    for stage in program.stages:
        for node in stage.graph.graph.find_nodes(op="call_function", target=LINEAR):
            place = _stored(stage, node.args[1], 0)
            if place is not None and place not in found:
                size = node.meta["val"].shape[-1]
                found[place] = torch.arange(first, first + size, dtype=torch.int32)
                first += size
    return found


def merged(pairs: list[torch.Tensor], count: int) -> torch.Tensor:
    """[count] for each label the smallest of those that are connected with it."""
    labels = torch.arange(count, dtype=torch.int32)
    if not pairs:
        return labels
    a, b = torch.cat(pairs, dim=1).long().unique(dim=1)
    while True:
        least = torch.minimum(labels[a], labels[b])
        lower = labels.scatter_reduce(0, a, least, "amin").scatter_reduce(0, b, least, "amin")
        lower = lower[lower.long()]
        if torch.equal(lower, labels):
            return labels
        labels = lower


def run(program: Program, rows: Mapping[Place, torch.Tensor], *, keep: bool) -> Labels:
    """Let labels flow through all stages.

    Args:
        program: program in floats.
        rows: labels of the outputs of each stored linear layer.
        keep: keep the labels of all values; otherwise each is dropped after its last reader.
    """
    found, ports = Labels(places=dict(rows)), dict[str, torch.Tensor]()
    for stage in program.stages:
        _Run(program, stage, found, ports, keep).run()
    return found


class _Run:
    """One stage with labels in place of values."""

    def __init__(
        self, program: Program, stage: Stage, found: Labels, ports: dict[str, torch.Tensor], keep: bool
    ) -> None:
        self._program, self._stage, self._found, self._ports, self._keep = program, stage, found, ports, keep
        self._values = found.values if keep else dict[fx.Node, Any]()
        self._constants = constant_values(stage.graph.graph)
        inputs = stage.graph.graph.find_nodes(op="placeholder")
        self._inputs = dict(zip(inputs, (port.name for port in stage.inputs), strict=True))

    def run(self) -> None:
        """Visit every node in order."""
        waiting = Counter(source for node in self._stage.graph.graph.nodes for source in node.all_input_nodes)
        for node in self._stage.graph.graph.nodes:
            self._visit(node)
            for source in node.all_input_nodes:
                waiting[source] -= 1
                if not waiting[source] and not self._keep:
                    self._values.pop(source, None)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder" and self._inputs[node] in self._ports:
            self._values[node] = self._ports[self._inputs[node]]
        elif node.op == "output":
            self._leave(node)
        elif node.op == "call_function":
            labels = self._passed(node)
            if labels is not None:
                self._values[node] = _compact_all(labels)

    def _leave(self, output: fx.Node) -> None:
        """Hand the labels of the outputs on; what the program returns keeps all channels."""
        for node, port in zip(output.args[0], self._stage.outputs, strict=True):  # type: ignore[arg-type]
            labels = self._values.get(node)
            if labels is None:
                continue
            if port.name in self._program.outputs:
                self._stop(labels, node, f"the program returns it as {port.name}")
            if port.name in self._ports:
                self._meet_labels(self._ports[port.name], labels, node)
            self._ports[port.name] = labels

    def _passed(self, node: fx.Node) -> Any:
        """The labels of what an operator computes; None where it has none."""
        if node.target is LINEAR:
            return self._linear(node)
        labelled = [source for source in node.all_input_nodes if source in self._values]
        if not labelled or is_size(node):
            return None
        rule = self._rule(node)
        if rule is None:
            self._stop_all(labelled, node, f"channels cannot be followed through {described(node)}")
            return None
        return rule(node)

    def _rule(self, node: fx.Node) -> Callable[[fx.Node], Any] | None:
        if node.target in CASTS or node.target in ELEMENTWISE or node.target in ACTIVATIONS:
            return self._elementwise
        if node.target in NORMS and node.target is not aten.group_norm.default:
            return self._norm
        if node.target is aten.mean.dim:
            return self._mean
        if node.target is SDPA:
            return self._attention
        return self._rearranged if rearranges(node) else None

    def _linear(self, node: fx.Node) -> torch.Tensor | None:
        value, weight, bias = (*node.args, None)[:3]
        labels = self._values.get(value)  # type: ignore[arg-type]
        rows, columns = _stored(self._stage, weight, 0), _stored(self._stage, weight, 1)
        if rows is None or columns is None:
            if labels is not None:
                self._stop(labels, node, "the weight of the layer that reads it is computed, not stored")
            return None
        if labels is not None:
            self._columns(node, columns, labels)
        self._found.rows.setdefault(rows, []).append(node)
        own = self._found.places[rows]
        result = own.expand(node.meta["val"].shape)
        if isinstance(bias, fx.Node):
            self._meet_value(node, result, bias)
        return result

    def _columns(self, node: fx.Node, place: Place, labels: torch.Tensor) -> None:
        """A layer reads one label in each column, whichever token it is of."""
        first = labels.reshape(-1, labels.shape[-1])[0]
        self._meet_labels(labels, first.expand(labels.shape), node)
        size = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
        first = first.expand(size)
        known = self._found.places.setdefault(place, first)
        if known is not first:
            self._meet_labels(known, first, node)
        self._found.rows.setdefault(place, []).append(node)

    def _elementwise(self, node: fx.Node) -> torch.Tensor:
        shape = node.meta["val"].shape
        sources = [source for source in node.all_input_nodes if not is_size(source)]
        labelled = [self._values[source] for source in sources if source in self._values]
        result = _aligned(labelled[0], len(shape))
        for other in labelled[1:]:
            result = self._meet_labels(result, _aligned(other, len(shape)), node)
        for source in sources:
            if source not in self._values:
                self._meet_value(node, result, source)
        if node.target in ACTIVATIONS and len(shape) >= TOKEN_RANK:
            self._found.activated.append(_known(result))
        return result

    def _norm(self, node: fx.Node) -> torch.Tensor | None:
        value, shape, *rest = node.args
        if value not in self._values:
            self._stop_all([n for n in node.all_input_nodes if n in self._values], node, "a norm is scaled by it")
            return None
        result = self._reduced(node, self._values[value], range(-len(shape), 0))  # type: ignore[arg-type]
        for weight in rest:
            if isinstance(weight, fx.Node):
                self._meet_value(node, result, weight)
        return result

    def _mean(self, node: fx.Node) -> torch.Tensor:
        value, dims, keep = (*node.args, False)[:3]
        labels = self._reduced(node, self._values[value], dims)  # type: ignore[arg-type, index]
        for dim in sorted((d % labels.ndim for d in dims), reverse=True):  # type: ignore[union-attr]
            labels = labels.narrow(dim, 0, 1) if keep else labels.select(dim, 0)
        return labels

    def _reduced(self, node: fx.Node, labels: torch.Tensor, dims: Any) -> torch.Tensor:
        """The labels; those along some dimensions meet, because one number is computed of them."""
        first = labels
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        self._meet_labels(labels, first.expand(labels.shape), node)
        return labels

    def _attention(self, node: fx.Node) -> torch.Tensor | None:
        """The channels of a head belong together, and those of its query, key and value."""
        labelled = [source for source in node.args[:3] if source in self._values]
        if len(labelled) < 3 or (len(node.args) > MASK and node.args[MASK] in self._values):
            self._stop_all(labelled, node, "not all of query, key and value come from stored linear layers")
            return None
        query, key, value = (self._reduced(node, self._values[source], (-2, -1)) for source in labelled)  # type: ignore[index]
        heads = [_heads(source, labels) for source, labels in zip(labelled, (query, key, value), strict=True)]
        if node.kwargs.get("enable_gqa"):
            heads = [side.repeat_interleave(heads[0].shape[-3] // side.shape[-3], dim=-3) for side in heads]
        self._meet_labels(heads[0], heads[1], node)
        result = self._meet_labels(heads[0], heads[2], node)
        mask = node.args[MASK] if len(node.args) > MASK else node.kwargs.get("attn_mask")
        if isinstance(mask, fx.Node):
            self._meet_value(node, result, mask)
        self._found.attended.append(_known(result))
        return result

    def _rearranged(self, node: fx.Node) -> Any:
        """Layouts are run on labels of the full shape."""

        def labels_of(source: fx.Node) -> Any:
            value = source.meta.get("val")
            if source in self._values:
                return _full(self._values[source], value)
            if isinstance(value, torch.Tensor):
                return torch.tensor(NOTHING, dtype=torch.int32).expand(value.shape)
            return value

        args, kwargs = fx.map_arg((node.args, node.kwargs), labels_of)  # type: ignore[misc]
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        return None if isinstance(result, torch.Tensor) and bool((result == NOTHING).all()) else result

    def _meet_labels(self, a: torch.Tensor, b: torch.Tensor, node: fx.Node) -> torch.Tensor:
        """The labels of both, which belong together; what only one of them labels stays as it is."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a != NOTHING) & (b != NOTHING)
        pairs = torch.stack([a[both], b[both]])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.numel():
            self._found.pairs.append(pairs.unique(dim=1))
        single = torch.maximum(a, b)[(a != NOTHING) ^ (b != NOTHING)]
        if single.numel():
            self._stop(single, node, f"{described(node)} combines it with a value that no linear layer writes")
        return torch.maximum(a, b) if single.numel() else a

    def _meet_value(self, node: fx.Node, labels: torch.Tensor, other: fx.Node) -> None:
        shape = tuple(other.meta["val"].shape)
        self._found.meetings.append(Meeting(node, labels, other, (1,) * (labels.ndim - len(shape)) + shape))

    def _stop(self, labels: Any, node: fx.Node, reason: str) -> None:
        every = labels if isinstance(labels, list | tuple) else [labels]
        self._found.stopped += [(_known(one), Refusal(node.name, reason)) for one in every]

    def _stop_all(self, sources: list[Any], node: fx.Node, reason: str) -> None:
        for source in sources:
            self._stop(self._values[source], node, reason)


def constant_place(program: Program, stage: Stage, node: fx.Node, axis: int) -> Place | None:
    """The place of an axis of a weight or of a table, where a node is one; None for another node."""
    if node.op == "placeholder":
        names = (port.name for port in stage.inputs)
        name = dict(zip(stage.graph.graph.find_nodes(op="placeholder"), names, strict=True))[node]
        return Place(TABLE, name, axis) if name in program.tables else None
    return _stored(stage, node, axis)


def varied(labels: torch.Tensor) -> list[int]:
    """The dimensions along which labels differ."""
    return [dim for dim, size in enumerate(compact(labels).shape) if size > 1]


def compact(labels: torch.Tensor) -> torch.Tensor:
    """Labels with size 1 where they repeat."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def _compact_all(labels: Any) -> Any:
    return compact(labels) if isinstance(labels, torch.Tensor) else [compact(one) for one in labels]


def _full(labels: Any, value: Any) -> Any:
    if isinstance(labels, torch.Tensor):
        return labels.expand(value.shape)
    return [one.expand(part.shape) for one, part in zip(labels, value, strict=True)]


def _aligned(labels: torch.Tensor, dims: int) -> torch.Tensor:
    return labels.reshape((1,) * (dims - labels.ndim) + labels.shape)


def _heads(source: Any, labels: torch.Tensor) -> torch.Tensor:
    """[..., H, 1, 1] the label of each head."""
    shape = source.meta["val"].shape
    return labels.expand(shape).narrow(-2, 0, 1).narrow(-1, 0, 1)


def _known(labels: torch.Tensor) -> torch.Tensor:
    found = labels.unique()
    return found[found != NOTHING]


def _stored(stage: Stage, weight: object, axis: int) -> Place | None:
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    assert axis < attribute(stage.graph, str(weight.target)).ndim
    return Place(stage.name, str(weight.target), axis)
