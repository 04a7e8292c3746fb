"""Program and Stage: what passes read and write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ..loop.ports import BoundProgram, BoundStage, InputPort, Port, Rate, StageCallable
from ..loop.recurrence import Recurrence
from ..loop.spec import LoopSpec
from ..loop.table import FoldedTable


@dataclass(frozen=True)
class FrozenDimension:
    """A dimension the capture specialized: of which input, to what, decided by which source line."""

    input: str
    dimension: int
    value: int
    source: str


@dataclass(frozen=True)
class ModelIdentity:
    """Which network a program came from."""

    class_name: str
    weights_sha256: str


@dataclass(frozen=True)
class Refusal:
    """A site a pass looked at and left alone, and why."""

    site: str
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, as reported by `optimize --json`.

    `drift` is the relative L2 change of the program's outputs on the probe against the program before this pass,
    `total_drift` against the captured program. `psnr_db` is the mean PSNR of whole samples after a lossy pass on a
    loop. FLOPs are of one evaluation of the step stage for one sample. Where `keeps_activations` is set, linear layers
    read what they read before, and statistics of them stay valid.
    """

    name: str
    outcome: str
    changed: int
    refused: tuple[Refusal, ...]
    drift: float
    total_drift: float
    parameters_before: int
    parameters_after: int
    flops_before: int
    flops_after: int
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)
    psnr_db: float | None = None
    keeps_activations: bool = False


@dataclass(frozen=True)
class Stage:
    """One graph of a program, run at one rate.

    `graph` takes one positional argument per input port and returns a tuple with one tensor per output port;
    weights are its attributes and every node carries its fake value in `node.meta["val"]`.

    Attributes:
        calls: grid calls it runs at, where several stages share the loop (early and late ones of other precision);
            None for all.
    """

    name: str
    rate: Rate
    graph: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    calls: range | None = None

    def bound(self, call: StageCallable) -> BoundStage:
        """The stage as something that can be called."""
        return BoundStage(self.name, self.rate, self.inputs, self.outputs, call, self.calls)

    def parameters(self) -> int:
        """Number of weights the graph holds, buffers of floating point or quantized weights included."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights the graph reads, by attribute name."""
        return {
            str(node.target): attribute(self.graph, str(node.target))
            for node in self.graph.graph.nodes
            if node.op == "get_attr"
        }


@dataclass(frozen=True)
class Schedule:
    """The folded loop a program ships: the full grid, and one fitted table for each declared guidance scale.

    `full` evaluates every call with the guidance scale left open (its weights are those of guided outputs); any
    scale without a fitted table falls back to it.
    """

    fitted: Mapping[float, FoldedTable]
    fitted_on: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A network, the loop around it, and everything passes decided.

    Attributes:
        stages: stages in topological order; a stage input takes the program input or earlier stage output of its name.
        inputs: program inputs by role.
        outputs: names of the program outputs; for a loop the first is the prediction.
        example: a valid value [B, ...] for each program input, B at least 2: the probe of verification, and the
            conditions of calibration.
        model: class and hash of the weights.
        loop: the loop, or None for a component.
        recurrence: the probed sampler, or None for a component.
        tables: values of rate `timestep` for every grid call, name -> [S, ...].
        schedule: fitted tables, once the schedule pass has run.
        records: what each pass did.
        frozen: dimensions the capture specialized.
        constants: keyword arguments baked in at capture, by name.
        unconditional: conditions [B, ...] of the other branch for the rows of `example`, where the caller of the loop
            supplies them.
    """

    stages: tuple[Stage, ...]
    inputs: tuple[InputPort, ...]
    outputs: tuple[str, ...]
    example: Mapping[str, torch.Tensor]
    model: ModelIdentity
    loop: LoopSpec | None = None
    recurrence: Recurrence | None = None
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)
    schedule: Schedule | None = None
    records: tuple[PassRecord, ...] = ()
    frozen: tuple[FrozenDimension, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    unconditional: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[Stage, ...]:
        """The stages that compute the prediction: one, or one for each part of the loop that has its own."""
        return tuple(stage for stage in self.stages if any(port.name == self.outputs[0] for port in stage.outputs))

    @property
    def step(self) -> Stage:
        """The stage that computes the prediction, once per evaluation; the first where parts of the loop differ."""
        return self.steps[0]

    def with_stage(self, stage: Stage) -> Program:
        """This program with the stage of the same name replaced."""
        return replace(self, stages=tuple(stage if s.name == stage.name else s for s in self.stages))

    def parameters(self) -> int:
        """Number of weights over all stages."""
        return sum(stage.parameters() for stage in self.stages)

    def bind(self) -> BoundProgram:
        """The PyTorch reference as callables from NumPy arrays to NumPy arrays."""
        return BoundProgram(
            self.inputs,
            self.outputs,
            tuple(stage.bound(reference(stage)) for stage in self.stages),
            self.tables,
        )


def attribute(module: torch.nn.Module, path: str) -> torch.Tensor:
    """The tensor at a dotted attribute path of a module."""
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    return getattr(module, name)


def reference(stage: Stage):
    """A stage as a function from named NumPy arrays to a list of NumPy arrays, run by PyTorch."""

    def call(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        arguments = [torch.from_numpy(np.ascontiguousarray(inputs[port.name])) for port in stage.inputs]
        with torch.no_grad():
            return [output.numpy() for output in stage.graph(*arguments)]

    return call
