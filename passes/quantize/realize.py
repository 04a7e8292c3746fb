"""What takes the place of the linear layers of a group in the graph."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ...ir.edit import add_buffer
from ...ir.program import attribute
from .algebra.packing import BlockedWeight
from .layers import mark_branch

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Place:
    """The layers of a group in the graph that is edited.

    Attributes:
        graph: graph that is edited.
        source: the value they read.
        layers: the linear nodes that are replaced.
        names: module path of each.
        stage: name of the stage.
        tables: what the stage is to read from tables, added by realizations: name -> [buckets].
        biases: biases of the layers that get another than their own.
    """

    graph: fx.GraphModule
    source: fx.Node
    layers: Sequence[fx.Node]
    names: Sequence[str]
    stage: str
    tables: dict[str, torch.Tensor]
    biases: Mapping[fx.Node, fx.Node] = field(default_factory=dict)

    def add(self, before: fx.Node, target: Callable[..., object], *arguments: object) -> fx.Node:
        """A call in front of a node."""
        with self.graph.graph.inserting_before(before):
            return self.graph.graph.call_function(target, arguments)  # type: ignore[arg-type]

    def hold(self, before: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
        """A weight, read in front of a node."""
        with self.graph.graph.inserting_before(before):
            return self.graph.graph.get_attr(add_buffer(self.graph, name, tensor))

    def tabulate(self, name: str, values: torch.Tensor) -> fx.Node:
        """A new input of the stage [B] that is the value [] of the bucket that is run."""
        name = f"{self.stage}.{name}"  # a part of the loop with a stage of its own has scales of its own
        self.tables[name] = values
        behind = self.graph.graph.find_nodes(op="placeholder")[-1]
        with self.graph.graph.inserting_after(behind):
            return self.graph.graph.placeholder(name.replace(".", "_"))

    def bias(self, layer: fx.Node) -> object:
        """The bias of a layer, or None."""
        return self.biases.get(layer, layer.args[2] if len(layer.args) > 2 else None)


class Realization(ABC):
    """The operators that compute what the layers of a group computed."""

    @abstractmethod
    def insert(self, place: Place) -> list[fx.Node]:
        """Add the operators and return one value for each layer; the layers themselves stay."""


class Activation(ABC):
    """How the value that integer products read is rounded to uint8."""

    @abstractmethod
    def insert(self, place: Place) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Add the operators and return q, scale and zero point."""


class DynamicActivation(Activation):
    """One scale for the tensor, taken at run time."""

    def insert(self, place: Place) -> tuple[fx.Node, fx.Node, fx.Node]:
        """See `Activation.insert`."""
        first = place.layers[0]
        triple = place.add(first, torch.ops.stepfold.quantize_dynamic.default, place.source)
        q, scale, zero = (place.add(first, operator.getitem, triple, i) for i in range(3))
        return q, scale, zero


@dataclass(frozen=True, eq=False)
class StaticActivation(Activation):
    """One scale that calibration found.

    Attributes:
        scale: [] float32.
        zero: [] uint8.
    """

    scale: torch.Tensor
    zero: torch.Tensor

    def insert(self, place: Place) -> tuple[fx.Node, fx.Node, fx.Node]:
        """See `Activation.insert`."""
        first, name = place.layers[0], place.names[0]
        scale = place.hold(first, f"{name}.input_scale", self.scale)
        zero = place.hold(first, f"{name}.input_zero", self.zero)
        q = place.add(first, torch.ops.stepfold.quantize_static.default, place.source, scale, zero)
        return q, scale, zero


@dataclass(frozen=True, eq=False)
class BucketedActivation(Activation):
    """One scale for each bucket of timesteps, read from a table by the call that is run.

    Attributes:
        scales: [buckets] float32.
        zeros: [buckets] uint8.
    """

    scales: torch.Tensor
    zeros: torch.Tensor

    def insert(self, place: Place) -> tuple[fx.Node, fx.Node, fx.Node]:
        """See `Activation.insert`."""
        first, name = place.layers[0], place.names[0]
        rows = [place.tabulate(f"{name}.input_{what}", part) for what, part in self._parts()]
        # the table has a row for each sample, all the same, because everything that crosses a stage has the batch
        scale, zero = (place.add(first, aten.select.int, row, 0, 0) for row in rows)
        q = place.add(first, torch.ops.stepfold.quantize_static.default, place.source, scale, zero)
        return q, scale, zero

    def _parts(self) -> tuple[tuple[str, torch.Tensor], ...]:
        return ("scale", self.scales), ("zero", self.zeros)


@dataclass(frozen=True, eq=False)
class IntegerProducts(Realization):
    """Products of uint8 activations with int8 weights; the activations are rounded once for all layers.

    Attributes:
        activation: how the input is rounded.
        weights: codes [M, N] int8 and scale [N] of each layer.
    """

    activation: Activation
    weights: Sequence[tuple[torch.Tensor, torch.Tensor]]

    def insert(self, place: Place) -> list[fx.Node]:
        """See `Realization.insert`."""
        rounded = self.activation.insert(place)
        results = []
        for layer, name, (codes, scale) in zip(place.layers, place.names, self.weights, strict=True):
            weight = place.hold(layer, f"{name}.weight_int8", codes)
            weight_scale = place.hold(layer, f"{name}.weight_scale", scale)
            arguments = (*rounded, weight, weight_scale, place.bias(layer))
            results.append(place.add(layer, torch.ops.stepfold.qlinear.default, *arguments))
        return results


@dataclass(frozen=True, eq=False)
class Shifted(Realization):
    """Products of the value less a constant, which their biases make up for (F7 of the method cards).

    linear(x, W) + b -> linear(x - c, W) + (b + c W 1). Whatever else reads the value, such as the branch beside a
    residual, reads it as it is.

    Attributes:
        products: products of the shifted value.
        offset: c.
        sums: W 1 [N] of each layer, with the weight that its products are made with: a rounded one, so that its
            rounding errors do not add up to a constant.
    """

    products: Realization
    offset: float
    sums: Sequence[torch.Tensor]

    def insert(self, place: Place) -> list[fx.Node]:
        """See `Realization.insert`."""
        first = place.layers[0]
        shifted = place.add(first, aten.sub.Tensor, place.source, self.offset)
        biases = {
            layer: self._moved_bias(place, layer, name, self.offset * total)
            for layer, name, total in zip(place.layers, place.names, self.sums, strict=True)
        }
        return self.products.insert(replace(place, source=shifted, biases=biases))

    @staticmethod
    def _moved_bias(place: Place, layer: fx.Node, name: str, added: torch.Tensor) -> fx.Node:
        """b + c W 1 [N], stored where b is."""
        bias, label = place.bias(layer), f"{name}.shifted_bias"
        if bias is None:
            return place.hold(layer, label, added)
        assert isinstance(bias, fx.Node)
        if bias.op != "get_attr":
            return place.add(layer, aten.add.Tensor, bias, place.hold(layer, label, added))
        stored = attribute(place.graph, str(bias.target)).detach()
        return place.hold(layer, label, (stored.to(torch.float64) + added.to(torch.float64)).to(stored.dtype))


@dataclass(frozen=True, eq=False)
class BlockedProducts(Realization):
    """Products with weights of a few bits in blocks.

    Attributes:
        weights: weights of each layer.
        round_activations: see `stepfold::blocked_linear`.
    """

    weights: Sequence[BlockedWeight]
    round_activations: bool

    def insert(self, place: Place) -> list[fx.Node]:
        """See `Realization.insert`."""
        results = []
        for layer, name, weight in zip(place.layers, place.names, self.weights, strict=True):
            blocks = place.hold(layer, f"{name}.weight_blocks", weight.blocks)
            scales = place.hold(layer, f"{name}.weight_scales", weight.scales)
            zeros = None if weight.zero_points is None else place.hold(layer, f"{name}.zeros", weight.zero_points)
            arguments = (place.source, blocks, scales, zeros, place.bias(layer))
            settings = (weight.bits, weight.block, self.round_activations)
            results.append(place.add(layer, torch.ops.stepfold.blocked_linear.default, *arguments, *settings))
        return results


@dataclass(frozen=True, eq=False)
class WithBranch(Realization):
    """A realization of the residual, and beside it a branch of low rank in full precision.

    The branch is plain `linear` nodes: an engine that has a kernel for the whole may claim them.

    Attributes:
        residual: what the rest of the weight becomes.
        down: [R, M], shared by all layers.
        ups: [N, R] of each layer.
    """

    residual: Realization
    down: torch.Tensor
    ups: Sequence[torch.Tensor]

    def insert(self, place: Place) -> list[fx.Node]:
        """See `Realization.insert`."""
        values = self.residual.insert(place)
        first = place.layers[0]
        held = place.hold(first, f"{place.names[0]}.branch_down", self.down)
        narrow = mark_branch(place.add(first, aten.linear.default, place.source, held))
        results = []
        for layer, name, value, up in zip(place.layers, place.names, values, self.ups, strict=True):
            held = place.hold(layer, f"{name}.branch_up", up)
            wide = mark_branch(place.add(layer, aten.linear.default, narrow, held))
            results.append(place.add(layer, aten.add.Tensor, value, wide))
        return results


@dataclass(frozen=True, eq=False)
class Reconstructed(Realization):
    """Plain layers whose weights are held in a smaller form and decoded at run time.

    Attributes:
        decode: operator that returns a weight [N, M].
        weights: tensors that the operator reads for each layer, by name.
        round_input: operator that rounds the value all of them read, and its scale []; None leaves it.
    """

    decode: Callable[..., object]
    weights: Sequence[Mapping[str, torch.Tensor]]
    round_input: tuple[Callable[..., object], torch.Tensor] | None = None

    def insert(self, place: Place) -> list[fx.Node]:
        """See `Realization.insert`."""
        source, first, results = place.source, place.layers[0], []
        if self.round_input is not None:
            target, scale = self.round_input
            source = place.add(first, target, source, place.hold(first, f"{place.names[0]}.input_scale", scale))
        for layer, name, tensors in zip(place.layers, place.names, self.weights, strict=True):
            held = [place.hold(layer, f"{name}.weight_{label}", tensor) for label, tensor in tensors.items()]
            weight = place.add(layer, self.decode, *held)
            results.append(place.add(layer, aten.linear.default, source, weight, place.bias(layer)))
        return results
