"""Check a request for samples and build what the driver needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..loop.driver import Request
from ..loop.errors import UsageError, nearest
from ..loop.ports import InputPort, Port
from ..loop.spec import LoopSpec
from ..loop.values import LARGEST_FACTOR
from .arrays import for_input, to_array

Array = np.ndarray


def check_noise(value: Any, shape: tuple[int, ...]) -> Array:
    """Noise of at least one sample: float32 [B, *shape], finite.

    Raises:
        UsageError: it is something else.
    """
    array = to_array("noise", value)
    expected = Port("noise", (None, *shape), "float32").shape_text
    if array.ndim != len(shape) + 1 or array.shape[1:] != shape or len(array) == 0:
        raise UsageError(f"noise: expected shape {expected} with B at least 1; received {list(array.shape)}.")
    if array.dtype != np.float32:
        raise UsageError(f"noise: expected dtype float32; received {array.dtype}. Convert it: .astype('float32')")
    if not (np.abs(array) <= LARGEST_FACTOR).all():  # also NaN
        count = int((~np.isfinite(array)).sum())
        if not count:
            raise UsageError(f"noise: expected standard normal numbers; received {float(np.abs(array).max()):g}.")
        raise UsageError(f"noise: expected finite numbers; received NaN or infinity in {count} places.")
    return array


def build_request(
    inputs: Sequence[InputPort],
    loop: LoopSpec,
    noise: Any,
    conditions: Mapping[str, Any],
    unconditional: Mapping[str, Any] | None,
    guided: bool,
) -> Request:
    """Everything about one call of the loop, checked.

    Args:
        inputs: inputs of the program.
        loop: roles and guidance.
        noise: [B, *noise_shape] float32.
        conditions: name -> [B, ...] of the conditional branch.
        unconditional: name -> [B, ...] of the other branch, only where the loop says that the caller supplies it;
            a condition that is not among them has the same value in both branches.
        guided: whether the unconditional branch is evaluated at all.

    Raises:
        UsageError: something is missing, unknown, or of another shape, dtype or range than the model takes.
    """
    latents = check_noise(noise, loop.noise_shape)
    ports = {port.name: port for port in inputs if port.role == "condition"}
    _check_names(conditions, ports, loop)
    missing = [port for name, port in ports.items() if name not in conditions]
    if missing:
        needs = ", ".join(str(port.port) for port in missing)
        raise UsageError(f"conditions: expected {needs}; received {sorted(conditions) or 'none'}.")
    checked = {name: _rows(port, conditions[name], len(latents)) for name, port in ports.items()}
    other = _unconditional(ports, loop, checked, unconditional, guided, len(latents))
    return Request(latents, checked, other)


def _check_names(given: Mapping[str, Any], ports: Mapping[str, InputPort], loop: LoopSpec) -> None:
    for name in given:
        if name in (loop.state, loop.timestep):
            raise UsageError(f"{name}: the loop computes this input itself; expected conditions only.")
        if name not in ports:
            hint = nearest(name, list(ports)) if ports else "this model takes none."
            raise UsageError(f"{name}: expected a condition of this model; received an unknown name: {hint}")


def _rows(port: InputPort, value: Any, batch: int) -> Array:
    array = for_input(port, value)
    if array.ndim == 0 or len(array) != batch:
        received = "a single value" if array.ndim == 0 else f"{len(array)}"
        raise UsageError(f"{port.name}: expected {batch} rows, one for each sample of the noise; received {received}.")
    return array


def _unconditional(
    ports: Mapping[str, InputPort],
    loop: LoopSpec,
    conditions: Mapping[str, Array],
    given: Mapping[str, Any] | None,
    guided: bool,
    batch: int,
) -> dict[str, Array] | None:
    declared = loop.guidance.unconditional if loop.guidance is not None else None
    if given is not None and declared != "input":
        raise UsageError(
            "unconditional: expected none; "
            + ("this loop has no guidance." if declared is None else f"the loop gives the values {declared}.")
        )
    if not guided or declared is None:
        return None
    if isinstance(declared, dict):
        values = {name: _broadcast(ports[name], value, batch) for name, value in declared.items() if name in ports}
    elif not given:
        raise UsageError(
            f"unconditional: expected a mapping with values for {', '.join(ports)} (a negative prompt), because the "
            "loop takes them as an input; received none. Pass unconditional={name: array} (in a file of --conditions "
            "the name is unconditional/NAME), or guidance=1.0."
        )
    else:
        _check_names(given, ports, loop)
        values = {name: _rows(ports[name], value, batch) for name, value in given.items()}
    return {**conditions, **values}


def _broadcast(port: InputPort, value: Any, batch: int) -> Array:
    """The value a loop gives for the unconditional branch, for every sample: a scalar, or the array of one sample."""
    array = to_array(port.name, value)
    shape = (batch, *(size or 1 for size in port.port.shape[1:]))
    try:
        repeated = np.broadcast_to(array, shape)
    except ValueError:
        raise UsageError(
            f"guidance.unconditional.{port.name}: expected a number or an array {list(shape[1:])}; received shape "
            f"{list(array.shape)}."
        ) from None
    return for_input(port, np.ascontiguousarray(repeated).astype(_literal_dtype(port, array)))


def _literal_dtype(port: InputPort, array: Array) -> np.dtype:
    """Numbers of a text file have no dtype of their own: whole numbers fit any port, others floats only."""
    return np.dtype(port.port.dtype) if array.dtype.kind in "iu" or port.port.dtype.startswith("float") else array.dtype
