"""The values that statistics are taken of: what linear layers read at every evaluation."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from ..ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ..ir.names import module_path
from ..ir.program import Program
from ..ir.shapes import PROBE_BATCHES
from .document import Layer, SiteEntry

LAYERS = (
    torch.ops.aten.linear.default,
    torch.ops.stepfold.qlinear.default,
    torch.ops.stepfold.blocked_linear.default,
)
QUANTIZERS = (torch.ops.stepfold.quantize_dynamic.default, torch.ops.stepfold.quantize_static.default)


@dataclass(frozen=True, eq=False)
class Watched:
    """A value of a stage and the linear layers that read it.

    Attributes:
        node: node of the value [..., M].
        entry: what the store says about it.
    """

    node: fx.Node
    entry: SiteEntry

    def by_row(self, value: torch.Tensor, rows: int) -> torch.Tensor:
        """The value as float32 [rows, T, M]; [1, T, M] when it does not follow the batch."""
        axis = _batch_axis(self.node)
        if axis is None:
            return value.float().reshape(1, -1, self.entry.width)
        return value.float().movedim(axis, 0).reshape(rows, -1, self.entry.width)


def watched_values(program: Program, gram_width: int) -> tuple[Watched, ...]:
    """The values that linear layers of the computing slots read, in order; layers that read one value share an entry.

    Args:
        program: float layers of the originals and those with quantized activations count.
        gram_width: widest value that gets a Gram matrix.
    """
    layers: dict[fx.Node, list[fx.Node]] = {}
    nodes = [node for slot in program.computing for node in slot.original.graph.graph.nodes]
    for node in nodes:
        value = _read_by_layer(node)
        if value is not None and value.meta["val"].is_floating_point() and _channels(value) is not None:
            layers.setdefault(value, []).append(node)
    order = {node: i for i, node in enumerate(nodes)}
    taken = Counter[str]()
    found = []
    for value in sorted(layers, key=order.__getitem__):
        path = module_path(layers[value][0])
        taken[path] += 1
        name = path if taken[path] == 1 else f"{path}#{taken[path]}"
        found.append(Watched(value, _entry(name, value, layers[value], gram_width)))
    return tuple(found)


def _read_by_layer(node: fx.Node) -> fx.Node | None:
    """The float value that a linear layer reads, or None for another node."""
    if node.op != "call_function" or node.target not in LAYERS:
        return None
    value = node.args[0]
    if isinstance(value, fx.Node) and value.target is operator.getitem:
        whole = value.args[0]  # the three values of a dynamic quantization, or the pieces of a split
        value = whole if isinstance(whole, fx.Node) and whole.target in QUANTIZERS else value
    if isinstance(value, fx.Node) and value.target in QUANTIZERS:
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None


def _entry(name: str, value: fx.Node, layers: list[fx.Node], gram_width: int) -> SiteEntry:
    width = _channels(value)
    assert width is not None
    batch = 1 if _batch_axis(value) is None else PROBE_BATCHES[0]
    named = tuple(Layer(path=module_path(node), node=node.name) for node in layers)
    tokens = prod(value.meta["val"].shape[:-1]) // batch
    return SiteEntry(name=name, value=value.name, layers=named, width=width, tokens=tokens, gram=width <= gram_width)


def _channels(value: fx.Node) -> int | None:
    """M, or None for a value without rows or whose last size is the batch."""
    shape = value.meta.get("shape", ())
    return shape[-1] if len(shape) > 1 else None


def _batch_axis(value: fx.Node) -> int | None:
    """The dimension that follows the batch."""
    shape = value.meta["shape"]
    return shape.index(None) if None in shape else None
