"""A program whose computing slots hand values of their graphs to whoever watches them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import fx

from ..ir.program import Program, Stage
from ..loop.ports import BoundProgram, StageCallable

Array = np.ndarray


class SiteObserver(fx.Interpreter):
    """Runs a stage and hands every watched value to a function."""

    def __init__(self, graph: fx.GraphModule, watched: Mapping[fx.Node, Callable[[torch.Tensor], None]]):
        """Watch nodes of `graph`."""
        super().__init__(graph)
        self._watched = watched

    def run_node(self, n: fx.Node) -> object:
        """Run one node; hand its value on when it is watched."""
        value = super().run_node(n)
        if n in self._watched:
            self._watched[n](value)  # type: ignore[arg-type]
        return value


def watched_program(program: Program, watched: Mapping[fx.Node, Callable[[torch.Tensor], None]]) -> BoundProgram:
    """The PyTorch reference of a program with nodes of its computing slots watched."""
    runs = {stage.name: SiteObserver(stage.graph, watched).run for stage in program.steps}
    return program.bound_by(lambda stage: _call(stage, runs.get(stage.name, stage.graph)))


def _call(stage: Stage, run: Callable[..., Sequence[torch.Tensor]]) -> StageCallable:
    """A stage as a function of arrays, copied into PyTorch's own memory: results may depend on their alignment."""

    def call(inputs: Mapping[str, Array]) -> list[Array]:
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[port.name])).clone() for port in stage.inputs]
        with torch.no_grad():
            return [output.numpy() for output in run(*tensors)]

    return call
