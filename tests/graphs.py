"""Small graphs for tests of rewrites: a Python function as the capture would see it, before any repair."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from stepfold.frontend.calling import Calling
from stepfold.frontend.capture import export, input_ports
from stepfold.frontend.normalize import normalize
from stepfold.ir.shapes import propagate
from stepfold.loop.ports import Port

aten = torch.ops.aten


@dataclass(frozen=True)
class Traced:
    """A graph, its ports, and the example it was traced with."""

    graph: fx.GraphModule
    inputs: tuple[Port, ...]
    example: dict[str, torch.Tensor]

    def propagate(self) -> None:
        """Set shapes again after a rewrite."""
        self.graph.recompile()
        propagate(self.graph, self.inputs)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.graph(*(tensors or self.example.values()))

    def calls(self) -> list[str]:
        """The operators in order, without reads of the batch size."""
        found = [
            str(node.target).removeprefix("aten.") for node in self.graph.graph.nodes if node.op == "call_function"
        ]
        return [name for name in found if name != "sym_size.int"]


def traced(function: Callable[..., Any] | torch.nn.Module, *examples: torch.Tensor) -> Traced:
    """Trace a function (or module) of tensors [B, ...] whose example batch is 2."""
    module = function if isinstance(function, torch.nn.Module) else _Function(function)
    names = list(inspect.signature(module.forward if module is function else function).parameters)
    example = dict(zip(names, examples, strict=True))
    calling = Calling(module.eval(), "call" if module is not function else "forward", example, names, None)
    graph, _ = normalize(export(calling, example, "test"))
    inputs = input_ports(graph, example)
    propagate(graph, inputs)
    return Traced(graph, inputs, example)


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.call = function
