"""Shapes and dtypes of every node, with the batch told apart from sizes that merely look like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ..loop.ports import Port

PROBE_BATCHES = (2, 3)  # two sizes: a dimension that follows the batch differs between them

Shape = tuple[int | None, ...]


def propagate(graph: fx.GraphModule, inputs: Sequence[Port]) -> None:
    """Run the graph on fake tensors and record what every node is.

    Sets `node.meta["val"]` (a FakeTensor of the first probe batch, or an int) and, for tensors,
    `node.meta["shape"]`: sizes, with None where the size follows the batch.
    """
    shapes = []
    for batch in reversed(PROBE_BATCHES):
        _run_fake(graph, inputs, batch)
        shapes.append({node: _sizes(node.meta.get("val")) for node in graph.graph.nodes})
    for node in graph.graph.nodes:
        large, small = shapes[0][node], shapes[1][node]
        if small is not None:
            node.meta["shape"] = tuple(a if a == b else None for a, b in zip(small, large, strict=True))
        else:
            node.meta.pop("shape", None)


def follows_batch(node: fx.Node) -> bool:
    """Whether the first dimension of a tensor node is the batch, and no other is."""
    shape = node.meta.get("shape")
    return bool(shape) and shape[0] is None and None not in shape[1:] and node.meta["val"].shape[0] == PROBE_BATCHES[0]


def port(node: fx.Node, name: str) -> Port:
    """The port of a tensor node."""
    return Port(name, node.meta["shape"], str(node.meta["val"].dtype).removeprefix("torch."))


def example(port: Port, batch: int = PROBE_BATCHES[0]) -> torch.Tensor:
    """Zeros of a port's shape and dtype."""
    return torch.zeros([batch if size is None else size for size in port.shape], dtype=getattr(torch, port.dtype))


def _run_fake(graph: fx.GraphModule, inputs: Sequence[Port], batch: int) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        arguments = [example(port, batch) for port in inputs]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*arguments)


def _sizes(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def flat_examples(inputs: Sequence[Port], values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of `values` in port order."""
    return [values[port.name] for port in inputs]


__all__ = ["PROBE_BATCHES", "FakeTensor", "Shape", "example", "flat_examples", "follows_batch", "port", "propagate"]
