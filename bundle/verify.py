"""Check a bundle on this machine: hashes, versions, stages, and the recorded probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..loop.errors import BundleError, StepfoldError, UsageError
from ..loop.ports import BoundProgram, InputPort, StageCallable
from .bind import LoadSession, bind, check_values, fits
from .files import AGAIN, unlisted
from .manifest import Manifest
from .probe import Probe
from .reader import Bundle, hold, read_manifest
from .tables import Tables


def verify(
    path: Path | str,
    load_session: LoadSession,
    differences: Callable[[Manifest], list[str]] = lambda manifest: [],
) -> tuple[list[str], list[str]]:
    """Check everything about a bundle that this machine can check; a damaged bundle is reported, not raised.

    Args:
        path: the folder.
        load_session: opens one stage; raises UsageError where its engine or device is missing here.
        differences: lines about what this machine does otherwise than the one that built the bundle.

    Returns:
        The problems, and what could not be checked here, one line each.

    Raises:
        UsageError: there is no such folder.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        held, damaged = hold(path, manifest)
    except BundleError as error:
        return [str(error)], ["files, stages and probe: the manifest cannot be used."]
    problems = damaged + unlisted(path, manifest.files)
    if damaged:
        return problems, ["stages and probe: not run from damaged files."]
    not_checked_here = differences(manifest)
    try:
        for prefix, bundle in _bundles(Bundle(path, manifest, held)):
            found, left = _run(bundle, load_session)
            problems += [f"{prefix}{line}" for line in found]
            not_checked_here += [f"{prefix}{line}" for line in left]
    except StepfoldError as error:
        return [*problems, str(error)], [*not_checked_here, "probe: not replayed."]
    return problems, not_checked_here


def _bundles(bundle: Bundle) -> Iterator[tuple[str, Bundle]]:
    """The bundle, and those of a pipeline that lie within it, each with what its lines begin with."""
    yield "", bundle
    for folder in bundle.manifest.pipeline.folders if bundle.manifest.pipeline else ():
        yield f"{folder}: ", bundle.within(folder)


def _run(bundle: Bundle, load_session: LoadSession) -> tuple[list[str], list[str]]:
    tables = bundle.tables()
    check_values(bundle.manifest, tables)
    sessions: dict[str, StageCallable] = {}
    problems, not_checked_here = [], []
    for stage in bundle.manifest.stages:
        try:
            sessions[stage.name] = load_session(bundle, stage)
        except UsageError as error:
            not_checked_here.append(f"stage {stage.name}: {error}")
        except StepfoldError as error:
            problems.append(f"stage {stage.name}: {error}")
    if len(sessions) < len(bundle.manifest.stages):
        return problems, [*not_checked_here, "probe: not replayed, because not every stage runs here."]
    program = bind(bundle, tables, lambda _, stage: sessions[stage.name])
    if not bundle.manifest.probes:
        return problems, ["probe: none recorded."]
    return problems + [line for probe in bundle.probes() for line in _replay(probe, program, tables)], not_checked_here


def _fits(port: InputPort, probe: Probe) -> bool:
    """Whether a probe holds an input: its shape and dtype, as many rows as the first, indices that its table has."""
    value = probe.inputs.get(port.name)
    if value is None or not fits(port.port, value):
        return False
    rows = len(next(iter(probe.inputs.values())))
    inside = port.cardinality is None or bool(((value >= 0) & (value < port.cardinality)).all())
    return inside and (port.port.shape[:1] != (None,) or 0 < len(value) == rows)


def _replay(probe: Probe, program: BoundProgram, tables: Tables) -> list[str]:
    """Differences of a replay of a probe."""
    missing = [p.name for p in program.inputs if not _fits(p, probe)]
    calls = tables.recurrence.calls if tables.recurrence is not None else 0
    if missing or (program.by_call and (probe.call is None or not 0 <= probe.call < calls)):
        return [f"probe: expected inputs {missing or 'and a grid call'}; it does not hold them. {AGAIN}"]
    outputs = program.evaluate({port.name: probe.inputs[port.name] for port in program.inputs}, probe.call)
    return probe.differences(dict(zip(program.outputs, outputs, strict=True)))
