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
    """A stage that can be called: the PyTorch reference or a session of an engine.

    Attributes:
        calls: grid calls it runs at, where several stages of one rate share the loop; None for all.
    """

    name: str
    rate: Rate
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    call: StageCallable
    calls: range | None = None

    def runs_at(self, call: int | None) -> bool:
        """Whether it is the stage of a grid call.

        Raises:
            ValueError: the stage has calls of its own and none is given.
        """
        if self.calls is None:
            return True
        if call is None:
            raise ValueError("a program whose stages share the loop is evaluated at a grid call")
        return call in self.calls


@dataclass(frozen=True)
class BoundProgram:
    """All stages of a program, in topological order, ready to run.

    Attributes:
        inputs: the program's inputs.
        outputs: names of the program's outputs; for a loop the first is the prediction.
        stages: the callables.
        tables: values of rate `timestep`, computed at compile time for every grid call: name -> [S, ...].
    """

    inputs: tuple[InputPort, ...]
    outputs: tuple[str, ...]
    stages: tuple[BoundStage, ...]
    tables: Mapping[str, Array]

    @property
    def by_call(self) -> bool:
        """Whether an evaluation has to know its grid call, for the tables or for which stages run."""
        return bool(self.tables) or any(stage.calls is not None for stage in self.stages)

    def evaluate(self, inputs: Mapping[str, Array], call: int | None = None) -> list[Array]:
        """Run every stage once on the same rows.

        Args:
            inputs: name -> [B, ...] for every program input.
            call: the grid call whose row of `tables` applies and whose stages run; needed only when there are any.
        """
        values = dict(inputs)
        rows = len(next(iter(inputs.values())))
        for name, table in self.tables.items():
            if call is None:
                raise ValueError("a program with timestep tables is evaluated at a grid call")
            values[name] = repeat_row(table[call], rows)
        for stage in self.stages:
            if not stage.runs_at(call):
                continue
            outputs = stage.call({port.name: values[port.name] for port in stage.inputs})
            values.update(zip((port.name for port in stage.outputs), outputs, strict=True))
        return [values[name] for name in self.outputs]


def repeat_row(row: Array, rows: int) -> Array:
    """[...] -> [rows, ...], contiguous."""
    return np.repeat(row[None], rows, axis=0)
