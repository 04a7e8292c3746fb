"""Named tensors that cross a stage boundary, and the rates at which they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from .spec import Role

Array = np.ndarray


class Rate(StrEnum):
    """How often a value changes; each rate is the set of roles the value depends on."""

    CONST = "const"
    ONCE = "once"
    TIMESTEP = "timestep"
    ONCE_TIMESTEP = "once×timestep"
    STEP = "step"

    @classmethod
    def of(cls, roles: Iterable[Role]) -> Rate:
        """The rate of a value that depends on inputs of these roles."""
        present = set(roles) - {"constant"}
        if "state" in present:
            return cls.STEP
        if present == {"condition", "timestep"}:
            return cls.ONCE_TIMESTEP
        if present == {"condition"}:
            return cls.ONCE
        return cls.TIMESTEP if present else cls.CONST

    @property
    def roles(self) -> frozenset[Role]:
        """The roles a value of this rate may depend on; a stage reads values whose roles are among its own."""
        return _ROLES[self]


_ROLES: dict[Rate, frozenset[Role]] = {
    Rate.CONST: frozenset(),
    Rate.ONCE: frozenset({"condition"}),
    Rate.TIMESTEP: frozenset({"timestep"}),
    Rate.ONCE_TIMESTEP: frozenset({"condition", "timestep"}),
    Rate.STEP: frozenset({"condition", "timestep", "state"}),
}


@dataclass(frozen=True)
class Port:
    """A named tensor of a stage: shape with None for the batch dimension, NumPy dtype name.

    Attributes:
        name: unique in the program; a stage input takes its value from the program input or stage output so named.
        shape: sizes, None where the batch stands.
        dtype: NumPy name, such as `float32` or `int64`.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def shape_text(self) -> str:
        """The shape as a person writes it: `[B, 1, 32, 32]`."""
        return "[" + ", ".join("B" if size is None else str(size) for size in self.shape) + "]"

    def __str__(self) -> str:
        return f"{self.name} {self.shape_text} {self.dtype}"


@dataclass(frozen=True)
class InputPort:
    """A program input: its role, its port and, for an index, how many values are valid."""

    port: Port
    role: Role
    cardinality: int | None = None

    @property
    def name(self) -> str:
        """The name of the input."""
        return self.port.name


StageCallable = Callable[[Mapping[str, Array]], Sequence[Array]]


@dataclass(frozen=True)
class BoundStage:
    """A stage that can be called: the PyTorch reference or a session of an engine."""

    name: str
    rate: Rate
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    call: StageCallable


@dataclass(frozen=True)
class BoundSlot:
    """A place of a program and the stages that may fill it, ready to run.

    Attributes:
        name: unique in the program.
        variants: stages of one rate and with the same outputs; the first is the original.
        by_call: [S] number of the variant at each grid call; None fills the slot with the original at every call.
    """

    name: str
    variants: tuple[BoundStage, ...]
    by_call: tuple[int, ...] | None = None

    @property
    def rate(self) -> Rate:
        """How often the slot is filled."""
        return self.variants[0].rate

    @property
    def outputs(self) -> tuple[Port, ...]:
        """What every variant computes, in order."""
        return self.variants[0].outputs

    def at(self, call: int | None) -> BoundStage:
        """The variant of a grid call.

        Raises:
            ValueError: the variants differ by call and none is given.
        """
        if self.by_call is None:
            return self.variants[0]
        if call is None:
            raise ValueError(
                "a program whose slots are filled differently from call to call is evaluated at a grid call"
            )
        return self.variants[self.by_call[call]]


def bound_slots(*stages: BoundStage) -> tuple[BoundSlot, ...]:
    """One slot for each of these stages."""
    return tuple(BoundSlot(stage.name, (stage,)) for stage in stages)


@dataclass(frozen=True)
class BoundProgram:
    """All slots of a program, in topological order, ready to run.

    Attributes:
        inputs: the program's inputs.
        outputs: names of the program's outputs; for a loop the first is the prediction.
        slots: places of the program and their callables.
        tables: values of rate `timestep`, computed at compile time for every grid call: name -> [S, ...].
    """

    inputs: tuple[InputPort, ...]
    outputs: tuple[str, ...]
    slots: tuple[BoundSlot, ...]
    tables: Mapping[str, Array]

    @property
    def stages(self) -> tuple[BoundStage, ...]:
        """Every variant of every slot, in order."""
        return tuple(stage for slot in self.slots for stage in slot.variants)

    @property
    def computing(self) -> tuple[BoundSlot, ...]:
        """The slots that a plan fills at each evaluation, in order."""
        return tuple(slot for slot in self.slots if slot.rate is Rate.STEP)

    @property
    def by_call(self) -> bool:
        """Whether an evaluation has to know its grid call, for the tables or for what fills the slots."""
        return bool(self.tables) or any(slot.by_call is not None for slot in self.slots)

    def evaluate(self, inputs: Mapping[str, Array], call: int | None = None) -> list[Array]:
        """Fill every slot once, on the same rows.

        Args:
            inputs: name -> [B, ...] for every program input.
            call: the grid call whose row of `tables` applies and whose variants run; needed only when there are any.
        """
        values = dict(inputs)
        rows = len(next(iter(inputs.values())))
        for name, table in self.tables.items():
            if call is None:
                raise ValueError("a program with timestep tables is evaluated at a grid call")
            values[name] = repeat_row(table[call], rows)
        for slot in self.slots:
            stage = slot.at(call)
            outputs = stage.call({port.name: values[port.name] for port in stage.inputs})
            values.update(zip((port.name for port in stage.outputs), outputs, strict=True))
        return [values[name] for name in self.outputs]


def repeat_row(row: Array, rows: int) -> Array:
    """[...] -> [rows, ...], contiguous."""
    return np.repeat(row[None], rows, axis=0)
