"""Program, Slot and Stage: what passes read and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ..loop.plan import Plan
from ..loop.ports import BoundProgram, BoundSlot, BoundStage, InputPort, Port, Rate, StageCallable
from ..loop.recurrence import Recurrence
from ..loop.spec import LoopSpec


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
    """One graph with its ports: what an engine compiles, and a variant of the slot that it may fill.

    `graph` takes one positional argument per input port and returns a tuple with one tensor per output port;
    weights are its attributes and every node carries its fake value in `node.meta["val"]`.
    """

    name: str
    rate: Rate
    graph: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def bound(self, call: StageCallable) -> BoundStage:
        """The stage as something that can be called."""
        return BoundStage(self.name, self.rate, self.inputs, self.outputs, call)

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
class Slot:
    """A named place of a program, and what may fill it.

    Attributes:
        name: unique among the slots; a slot with one variant has its name.
        variants: stages of one rate and with the same outputs; the first is the original. Each reads what it needs.
        by_call: [S] number of the variant at each grid call, where a recipe or a pipeline fixes it; None fills the slot
            with the original at every call.
    """

    name: str
    variants: tuple[Stage, ...]
    by_call: tuple[int, ...] | None = None

    @classmethod
    def of(cls, stage: Stage) -> Slot:
        """The slot that one stage fills at every call."""
        return cls(stage.name, (stage,))

    @property
    def original(self) -> Stage:
        """The first variant."""
        return self.variants[0]

    def number_at(self, call: int | None) -> int:
        """The number of the variant of a grid call; None is any call of a program that has none."""
        return 0 if self.by_call is None or call is None else self.by_call[call]

    @property
    def rate(self) -> Rate:
        """How often the slot is filled."""
        return self.original.rate

    @property
    def outputs(self) -> tuple[Port, ...]:
        """What every variant computes, in order."""
        return self.original.outputs


def slots_of(*stages: Stage) -> tuple[Slot, ...]:
    """One slot for each of these stages."""
    return tuple(Slot.of(stage) for stage in stages)


@dataclass(frozen=True)
class Schedule:
    """The fitted plans that a program ships, one for each declared guidance scale.

    Any other scale evaluates every call of the grid.
    """

    fitted: Mapping[float, Plan]
    fitted_on: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A network, the loop around it, and everything passes decided.

    Attributes:
        slots: slots in topological order; a stage input takes the program input or earlier slot output of its name.
        inputs: program inputs by role.
        outputs: names of the program outputs; for a loop the first is the prediction.
        example: a valid value [B, ...] for each program input, B at least 2: the probe of verification, and the
            conditions of calibration.
        model: class and hash of the weights.
        loop: the loop, or None for a component.
        recurrence: the probed sampler, or None for a component.
        tables: values of rate `timestep` for every grid call, name -> [S, ...].
        schedule: fitted plans, once the schedule pass has run.
        records: what each pass did.
        frozen: dimensions the capture specialized.
        constants: keyword arguments baked in at capture, by name.
        unconditional: conditions [B, ...] of the other branch for the rows of `example`, where the caller of the loop
            supplies them.
    """

    slots: tuple[Slot, ...]
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
    def stages(self) -> tuple[Stage, ...]:
        """Every variant of every slot, in order."""
        return tuple(stage for slot in self.slots for stage in slot.variants)

    @property
    def computing(self) -> tuple[Slot, ...]:
        """The slots that are filled at every evaluation, in order; the prediction is among the outputs of the last."""
        rate = next(slot.rate for slot in self.slots if any(port.name == self.outputs[0] for port in slot.outputs))
        return tuple(slot for slot in self.slots if slot.rate is rate)

    @property
    def steps(self) -> tuple[Stage, ...]:
        """Every variant of the computing slots."""
        return tuple(stage for slot in self.computing for stage in slot.variants)

    @property
    def step(self) -> Stage:
        """The one stage that computes the prediction, of a program that no pass has cut: the original."""
        (slot,) = self.computing
        return slot.original

    def with_stages(self, changed: Sequence[Stage]) -> Program:
        """This program with the stages of these names replaced."""
        by_name = {stage.name: stage for stage in changed}
        slots = (
            replace(slot, variants=tuple(by_name.get(stage.name, stage) for stage in slot.variants))
            for slot in self.slots
        )
        return replace(self, slots=tuple(slots))

    def with_stage(self, stage: Stage) -> Program:
        """This program with the stage of the same name replaced."""
        return self.with_stages([stage])

    def parameters(self) -> int:
        """Number of weights over all stages."""
        return sum(stage.parameters() for stage in self.stages)

    def bind(self) -> BoundProgram:
        """The PyTorch reference as callables from NumPy arrays to NumPy arrays."""
        return self.bound_by(reference)

    def bound_by(self, call: Callable[[Stage], StageCallable]) -> BoundProgram:
        """The program with each of its stages as a callable.

        Args:
            call: function that opens a stage.
        """
        slots = (
            BoundSlot(slot.name, tuple(stage.bound(call(stage)) for stage in slot.variants), slot.by_call)
            for slot in self.slots
        )
        return BoundProgram(self.inputs, self.outputs, tuple(slots), self.tables)


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
