"""Find the smallest failing part of a bundle that does not verify."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backends.capability import installed
from ..backends.onnxruntime.session import own_content
from ..bundle.bind import bind
from ..bundle.manifest import StageEntry
from ..bundle.reader import Bundle, read
from ..loop.errors import UsageError
from ..loop.ports import StageCallable

Array = np.ndarray
REDUCIBLE = "onnxruntime"


@dataclass(frozen=True)
class Reduced:
    """The smallest part of a stage that fails.

    Attributes:
        stage: its name.
        file: the part, as ONNX.
        nodes: nodes of the part.
        of: nodes of the stage.
    """

    stage: str
    file: Path
    nodes: int
    of: int


def reduce_bundle(path: Path, folder: Path) -> list[Reduced]:
    """Write the smallest failing part of every stage that fails on the recorded probe.

    Args:
        path: a bundle whose files are whole.
        folder: folder to write `<bundle>-<stage>-reduced.onnx` into.

    Returns:
        One entry for each stage that fails; none where the engine computes every stage as its graph says.

    Raises:
        UsageError: the stages of this engine cannot be cut, or `onnx` is not installed.
        BundleError: the bundle is damaged.
    """
    bundle = read(path)
    engine = bundle.manifest.backend.name
    if engine != REDUCIBLE:
        raise UsageError(
            f"--reduce: expected a bundle of {REDUCIBLE}, whose stages are graphs; received one of {engine}. A graph "
            "that this engine refuses is reduced when it is built."
        )
    if not installed("onnx"):
        raise UsageError("--reduce needs the package onnx: pip install 'stepfold[compile]'")
    for stage in bundle.manifest.stages:
        own_content(bundle.file(stage.file), bundle.stage_files(stage))  # whatever else it names is not read
    return [found for stage, feed in _feeds(bundle).items() if (found := _reduced(bundle, stage, feed, folder))]


def _feeds(bundle: Bundle) -> dict[str, Mapping[str, Array]]:
    """What each stage reads when the probes are replayed, by the stage's name; computed node by node."""
    from ..backends.onnxruntime.reproduce import node_by_node

    feeds: dict[str, Mapping[str, Array]] = {}

    def load_session(inner: Bundle, stage: StageEntry) -> StageCallable:
        def call(values: Mapping[str, Array]) -> list[Array]:
            feeds[stage.name] = dict(values)
            outputs = node_by_node(inner.file(stage.file), values)
            return [outputs[port.name] for port in stage.outputs]

        return call

    program = bind(bundle, bundle.tables(), load_session)
    for probe in bundle.probes():
        with suppress(Exception):  # a stage that cannot be run has its feed; those after it have none
            program.evaluate({port.name: probe.inputs[port.name] for port in program.inputs}, probe.call)
    return feeds


def _reduced(bundle: Bundle, name: str, feed: Mapping[str, Array], folder: Path) -> Reduced | None:
    import onnx

    from ..backends.onnxruntime.reproduce import smallest_failure

    stage = next(stage for stage in bundle.manifest.stages if stage.name == name)
    file, probe = bundle.file(stage.file), bundle.probe()
    part = smallest_failure(file, feed, probe.tolerance if probe else 0.0)
    if part is None:
        return None
    target = folder / f"{bundle.path.resolve().name}-{name}-reduced.onnx"
    onnx.save_model(part, str(target))
    whole = onnx.load(file, load_external_data=False)
    return Reduced(name, target, len(part.graph.node), len(whole.graph.node))
