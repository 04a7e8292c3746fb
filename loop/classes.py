"""Class indices: which condition of a loop is one, which of its values are classes, and the classes of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import UsageError
from .ports import InputPort
from .spec import LoopSpec
from .values import array_of

Array = np.ndarray


@dataclass(frozen=True)
class ClassInput:
    """The condition that is a class index.

    Attributes:
        name: name of the input.
        dtype: its NumPy dtype name.
        classes: the valid indices; the row of the unconditional branch is not a class.
    """

    name: str
    dtype: str
    classes: tuple[int, ...]


def class_input(inputs: Sequence[InputPort], loop: LoopSpec) -> ClassInput | None:
    """The class index of a model that has no other condition, or None."""
    conditions = [port for port in inputs if port.role == "condition"]
    if len(conditions) != 1 or conditions[0].cardinality is None or conditions[0].port.shape != (None,):
        return None
    port = conditions[0]
    given = loop.guidance.unconditional if loop.guidance is not None else {}
    unconditional = given.get(port.name) if isinstance(given, dict) else None
    classes = tuple(i for i in range(conditions[0].cardinality) if i != unconditional)
    return ClassInput(port.name, port.port.dtype, classes)


def check_unconditional(inputs: Sequence[InputPort], loop: LoopSpec) -> None:
    """Compare the values of the unconditional branch with the inputs that they are for.

    Raises:
        UsageError: one does not broadcast to a sample of its input, is a fraction where that takes whole numbers, or
            is an index outside the table that it reads.
    """
    given = loop.guidance.unconditional if loop.guidance is not None else {}
    for name, value in given.items() if isinstance(given, dict) else ():
        for port in (port for port in inputs if port.name == name):
            reason = _misfit(port, array_of(value))
            if reason is not None:
                raise UsageError(f"guidance.unconditional.{name}: expected {reason}; received {value!r:.60}.")


def _misfit(port: InputPort, value: Array) -> str | None:
    """What was expected of a value that does not fit, or None."""
    sizes = tuple(size or 1 for size in port.port.shape[1:])
    fits = value.ndim <= len(sizes) and all(v in (1, s) for v, s in zip(value.shape[::-1], sizes[::-1], strict=False))
    if not fits:
        return f"a number or an array {list(sizes)}" if sizes else "a number"
    if port.port.dtype.startswith(("int", "uint")) and not (value == np.floor(value)).all():
        return "a whole number"
    if port.cardinality is not None and not ((value >= 0) & (value < port.cardinality)).all():
        return f"an index from 0 to {port.cardinality - 1}"
    return None


def class_conditions(
    inputs: Sequence[InputPort], loop: LoopSpec, count: int, classes: Sequence[int] | None = None
) -> dict[str, Array]:
    """The conditions of `count` samples by class; empty for a model without conditions.

    Args:
        inputs: inputs of the program.
        loop: names the unconditional row.
        count: number of samples B.
        classes: class of sample i is the i-th of these, cycled; None takes i modulo the number of classes.

    Returns:
        name -> [B].

    Raises:
        UsageError: a class outside the range, or a model whose conditions are not a class index.
    """
    found = class_input(inputs, loop)
    if found is None:
        return _without_classes(inputs, classes)
    if classes is not None and len(classes) == 0:
        raise UsageError("classes: expected at least one; received an empty list.")
    outside = [c for c in classes or () if c not in found.classes]
    if outside:
        raise UsageError(
            f"classes: expected indices from {found.classes[0]} to {found.classes[-1]}; received {outside[0]}."
        )
    candidates = found.classes if classes is None else classes
    return {found.name: np.asarray([candidates[i % len(candidates)] for i in range(count)], found.dtype)}


def _without_classes(inputs: Sequence[InputPort], classes: Sequence[int] | None) -> dict[str, Array]:
    conditions = [str(port.port) for port in inputs if port.role == "condition"]
    if conditions:
        raise UsageError(
            "classes: expected a model whose only condition is a class index; this one needs "
            f"{', '.join(conditions)}. Give these arrays by name: --conditions FILE.safetensors, or "
            "Engine.sample(noise, name=array)."
        )
    if classes is not None:
        raise UsageError(f"classes: expected none, because this model has no conditions; received {list(classes)}.")
    return {}
