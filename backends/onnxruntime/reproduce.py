"""The smallest part of a stage that ONNX Runtime computes wrongly, or not at all, for a report to its authors.

What is right is the same graph without the engine's own optimizations, node by node.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from ...loop.errors import UsageError
from ...loop.metrics import drift
from ..onnx.reduce import reduce
from .session import session_options

Array = np.ndarray
LARGEST_BYTES = 1 << 30
"""Of a model whose parts are tried: they are passed on as one protobuf, which ends at 2 GiB."""


def node_by_node(file: Path, feed: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a stage by name, without optimizations of its graph."""
    session = _session(_loaded(file), optimized=False)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def smallest_failure(file: Path, feed: Mapping[str, Array], tolerance: float) -> onnx.ModelProto | None:
    """The smallest part of a stage that fails as the whole does, or None where the stage does not fail.

    A part fails when the engine cannot open or run it, or when its optimized form computes something else.

    Args:
        file: `.onnx` file of the stage.
        feed: its inputs by name.
        tolerance: largest relative L2 error of an output.

    Raises:
        UsageError: the stage is too large to be tried in parts.
    """
    model = _loaded(file)
    if model.ByteSize() > LARGEST_BYTES:
        raise UsageError(f"{file}: expected at most {LARGEST_BYTES} bytes of weights to look for the failing part.")
    values = dict(feed) | _intermediate(model, feed)
    _note_types(model, values)

    def fails(part: onnx.ModelProto) -> bool:
        return _differs(part, values, tolerance)

    return reduce(model, fails) if fails(model) else None


def _loaded(file: Path) -> onnx.ModelProto:
    return onnx.load(file, load_external_data=True)


def _session(model: onnx.ModelProto, *, optimized: bool) -> Any:
    options = session_options(None)
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _intermediate(model: onnx.ModelProto, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Every value of the graph by name; none where the engine cannot open it."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    returned = {output.name for output in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name and name not in returned]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        session = _session(watched, optimized=False)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feed)), strict=True))
    except Exception:  # noqa: BLE001  (ONNX Runtime has a dozen error classes without a common base)
        return {}


def _note_types(model: onnx.ModelProto, values: Mapping[str, Array]) -> None:
    """Write the types of values into the model: those of the engine's own operators cannot be inferred."""
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    del model.graph.value_info[:]
    for name, value in values.items():
        if name not in known:
            kind = helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype)
            model.graph.value_info.append(helper.make_tensor_value_info(name, kind, None))


def _differs(part: onnx.ModelProto, values: Mapping[str, Array], tolerance: float) -> bool:
    """Whether the engine fails on a part; one whose inputs have no known values must open at least."""
    names = [value.name for value in part.graph.input]
    known = all(name in values for name in names)
    try:
        sessions = [_session(part, optimized=optimized) for optimized in (False, True)]
        if not known:
            return False
        plain, fast = (session.run(None, {name: values[name] for name in names}) for session in sessions)
    except Exception:  # noqa: BLE001  (see above)
        return True
    return any(not drift(got, wanted) <= tolerance for got, wanted in zip(fast, plain, strict=True))
