"""Keyword arguments of one evaluation, as the model's own forward gets them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..loop.errors import UsageError, nearest
from ..loop.ports import InputPort
from .arrays import for_input, to_array

Array = np.ndarray


def flatten(kwargs: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Nested lists and dictionaries by names joined with dots.

    Args:
        kwargs: keyword arguments.
        known: names that stand for one value, even when it is a list of numbers.
    """
    found: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name not in known and isinstance(value, Mapping):
            members = {f"{name}.{key}": item for key, item in value.items()}
        elif name not in known and isinstance(value, (list, tuple)):
            members = {f"{name}.{index}": item for index, item in enumerate(value)}
        else:
            found[name] = value
            continue
        found |= flatten(members, known)
    return found


def check_arguments(
    inputs: Sequence[InputPort], constants: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Array]:
    """The arrays of one evaluation, checked.

    Args:
        inputs: inputs of the program.
        constants: arguments baked in at capture; passing one is fine when it has that value.
        kwargs: arguments as the model's forward gets them.

    Returns:
        name -> [B, ...] for every input; a number for an input of one number a sample is that of all of them.

    Raises:
        UsageError: an argument is missing, unknown, differs from what was baked in, or does not fit its port.
    """
    ports = {port.name: port for port in inputs}
    values = flatten(kwargs, {*ports, *constants})
    for name, value in values.items():
        if name in constants:
            _check_constant(name, constants[name], value)
        elif name not in ports:
            hint = nearest(name, [*ports, *constants])
            raise UsageError(f"{name}: expected an argument of this model; received an unknown name: {hint}")
    missing = [port for name, port in ports.items() if name not in values]
    if missing:
        needs = ", ".join(str(port.port) for port in missing)
        raise UsageError(f"arguments: expected {needs}; received {sorted(values) or 'none'}.")
    single = [name for name, port in ports.items() if port.port.shape == (None,) and np.ndim(values[name]) == 0]
    arrays = {name: for_input(port, values[name]) for name, port in ports.items() if name not in single}
    _check_batch(ports, arrays)
    rows = next((len(array) for name, array in arrays.items() if ports[name].port.shape[:1] == (None,)), 1)
    spread = {name: np.repeat(for_input(ports[name], _one_row(values[name])), rows) for name in single}
    return {name: spread[name] if name in spread else arrays[name] for name in ports}


def _one_row(value: Any) -> Any:
    """A number without a batch, such as the timestep of all samples, as that of one sample."""
    return value.reshape(1) if hasattr(value, "reshape") else [value]


def _check_constant(name: str, baked: Any, value: Any) -> None:
    if isinstance(baked, np.ndarray):
        same = np.array_equal(baked, to_array(name, value))
    else:
        same = type(value) is type(baked) and value == baked
    if not same:
        shown = f"an array {list(baked.shape)}" if isinstance(baked, np.ndarray) else repr(baked)
        raise UsageError(
            f"{name}: expected {shown}, which was baked in when the model was captured; received another value "
            f"({value!r:.60}). Leave it out, or optimize the model again with the value you need."
        )


def _check_batch(ports: Mapping[str, InputPort], arrays: Mapping[str, Array]) -> None:
    sizes = {name: len(array) for name, array in arrays.items() if ports[name].port.shape[:1] == (None,)}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise UsageError(f"arguments: expected one batch size of at least 1; received {sizes}.")
