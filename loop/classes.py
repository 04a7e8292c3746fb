"""Class indices: which condition of a loop is one, which of its values are classes, and the classes of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import UsageError
from .ports import InputPort
from .spec import LoopSpec

Array = np.ndarray


@dataclass(frozen=True)
class ClassInput:
    """The condition that is a class index.

    Attributes:
        name: of the input.
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


def class_conditions(
    inputs: Sequence[InputPort], loop: LoopSpec, count: int, classes: Sequence[int] | None = None
) -> dict[str, Array]:
    """The conditions of `count` samples by class; empty for a model without conditions.

    Args:
        inputs: of the program.
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
            f"{', '.join(conditions)}. Give these arrays beside the noise: Engine.sample(noise, name=array)."
        )
    if classes is not None:
        raise UsageError(f"classes: expected none, because this model has no conditions; received {list(classes)}.")
    return {}
