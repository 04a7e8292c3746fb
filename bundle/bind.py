"""Bind the stages of a bundle to sessions: the program the driver runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..loop.errors import BundleError
from ..loop.ports import BoundProgram, BoundSlot, BoundStage, Port, Rate, StageCallable
from ..loop.spec import Role
from .files import AGAIN
from .manifest import Manifest, StageEntry
from .reader import Bundle
from .tables import Tables

Array = np.ndarray
LoadSession = Callable[[Bundle, StageEntry], StageCallable]


def bind(bundle: Bundle, tables: Tables, load_session: LoadSession) -> BoundProgram:
    """All stages of a bundle as callables.

    Args:
        bundle: the bundle.
        tables: its tables.
        load_session: opens one stage.

    Raises:
        BundleError: a stage reads a value that nothing provides, or a table has another shape than its readers.
    """
    manifest = bundle.manifest
    check_values(manifest, tables)
    opened = {
        stage.name: BoundStage(
            stage.name, stage.rate, stage.input_ports(), stage.output_ports(), load_session(bundle, stage)
        )
        for stage in manifest.stages
    }
    slots = tuple(
        BoundSlot(slot.name, tuple(opened[name] for name in slot.variants), slot.by_call) for slot in manifest.slots
    )
    return BoundProgram(manifest.input_ports(), manifest.outputs, slots, dict(tables.values))


def check_values(manifest: Manifest, tables: Tables) -> None:
    """Raise BundleError unless every stage finds each of its inputs computed before it, in the right shape."""
    known: dict[str, Port] = {entry.name: entry.port() for entry in manifest.inputs}
    roles: dict[str, frozenset[Role]] = {entry.name: frozenset({entry.role}) for entry in manifest.inputs}
    roles |= dict.fromkeys(tables.values, Rate.TIMESTEP.roles)
    _check_calls(manifest, tables)
    for name, value in tables.values.items():
        if name in known:
            raise BundleError(f"the value {name!r} is both an input and a table. {AGAIN}")
        known[name] = Port(name, (None, *value.shape[1:]), str(value.dtype))
    for stage in manifest.stages:
        for port in stage.input_ports():
            if port.name not in known or not _agree(known[port.name], port):
                raise BundleError(
                    f"stage {stage.name}: expected a value {port}; received {known.get(port.name, 'none')}. {AGAIN}"
                )
            if not roles[port.name] <= stage.rate.roles:
                raise BundleError(
                    f"stage {stage.name}: expected values of its rate, {stage.rate}; {port.name!r} changes more often. "
                    f"{AGAIN}"
                )
        needed = Rate.of(role for port in stage.input_ports() for role in roles[port.name])
        if manifest.loop is not None and needed is not stage.rate:
            raise BundleError(
                f"stage {stage.name}: expected the rate of what it reads, {needed}; received {stage.rate}. {AGAIN}"
            )
        for port in stage.output_ports():
            roles[port.name] = stage.rate.roles
            if port.name in tables.values:
                raise BundleError(f"the value {port.name!r} is both computed and a table. {AGAIN}")
            known[port.name] = port


def _check_calls(manifest: Manifest, tables: Tables) -> None:
    """Raise BundleError unless every call of the loop, and every cell of a plan, names a variant of its slot."""
    calls = tables.recurrence.calls if tables.recurrence is not None else 0
    slots = {slot.name: slot for slot in manifest.slots}
    for slot in manifest.slots:
        if slot.by_call is not None and len(slot.by_call) != calls:
            raise BundleError(
                f"slot {slot.name}: expected a variant for each of {calls} calls; received {len(slot.by_call)}. {AGAIN}"
            )
    computing = {stage.name for stage in manifest.stages if stage.rate is Rate.STEP}
    for name, cell in ((name, cell) for plan in tables.fitted.values() for name, cell in plan.cells.items()):
        slot = slots.get(name)
        if slot is None or slot.variants[0] not in computing or (cell.variant >= len(slot.variants)).any():
            raise BundleError(f"slot {name}: a plan fills it with a variant that the bundle lacks. {AGAIN}")


def other_branch(bundle: Bundle) -> dict[str, Array]:
    """Recorded conditions [B, ...] of the other guidance branch, by name; empty where no pipeline gave them.

    Raises:
        BundleError: one is no condition of the model, or has another shape or dtype than its input.
    """
    probe = bundle.probe()
    ports = {port.name: port.port for port in bundle.manifest.input_ports() if port.role == "condition"}
    found = dict(probe.unconditional) if probe is not None else {}
    for name, value in found.items():
        if name not in ports or not fits(ports[name], value):
            raise BundleError(
                f"probe: expected {ports.get(name, 'a condition of the model')} of the other guidance branch; received "
                f"{name} {list(value.shape)} {value.dtype}. {AGAIN}"
            )
    return found


def fits(port: Port, value: Array) -> bool:
    """Whether an array has the shape (any batch) and the dtype of a port."""
    return _agree(port, Port(port.name, value.shape, str(value.dtype)))


def _agree(first: Port, second: Port) -> bool:
    """Whether two ports can be the same value: equal dtype, rank and fixed sizes."""
    if first.dtype != second.dtype or len(first.shape) != len(second.shape):
        return False
    return all(a == b or a is None or b is None for a, b in zip(first.shape, second.shape, strict=True))
