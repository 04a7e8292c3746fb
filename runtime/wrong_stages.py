"""Compiled stages against their graphs, on the program's own example, before anything is fitted on them or written.

A stage that an exporter or an engine gets wrong is named with the first operator whose value differs, and with the
smallest part of its graph that still does.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends import Backend
from ..loop.errors import StepfoldError
from ..loop.ports import BoundProgram, repeat_row

if TYPE_CHECKING:
    from torch import fx

    from ..ir.program import Program, Slot, Stage

Array = np.ndarray

TOLERANCE = {"float32": 1e-3, "float64": 1e-3, "float16": 2e-2}
OTHER_TOLERANCE = 1e-1
"""Relative L2 error by the lowest precision of a stage; below float16 each engine rounds in its own way."""
ON_GPU = 2e-2
"""At least, where products of float32 are those of TF32, with 10 bits behind the point."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Of a failing part in nodes, as they are tried."""


def require_right(program: Program, bound: BoundProgram, backend: Backend, known: Collection[int]) -> None:
    """Compare every compiled stage with its graph.

    Args:
        program: whose stages are compiled; one without an example, as is made to time a layer, cannot be compared.
        bound: the same, on the engine.
        backend: backend that compiled them.
        known: stages, by identity, that were compared before.

    Raises:
        StepfoldError: an engine computes something else than its graph, or the graph numbers that are not finite.
    """
    from ..ir.probe import probe_calls, probe_inputs
    from ..ir.program import reference

    left = [stage for stage in program.stages if id(stage) not in known] if program.example else []
    for call in _calls(program, probe_calls(program)[0]):
        if not left:
            return
        values = probe_inputs(program, call)
        rows = len(next(iter(values.values())))
        if call is not None:
            values |= {name: repeat_row(table[call], rows) for name, table in program.tables.items()}
        for slot, opened in zip(program.slots, bound.slots, strict=True):
            here = slot.number_at(call)
            for number in sorted({here, *_unassigned(slot)}, key=lambda other: other == here):
                stage, session = slot.variants[number], opened.variants[number].call
                feed = {port.name: values[port.name] for port in stage.inputs}
                computed = backend.prepared(stage)
                wanted = _named(stage, reference(computed)(feed))
                if stage in left:
                    left.remove(stage)
                    fault = difference(_named(stage, session(feed)), wanted, tolerance(computed, backend))
                    if fault is not None:
                        raise StepfoldError(
                            f"stage {stage.name}: expected {backend.name} to compute what the graph says, on the example "
                            f"inputs; {fault}. {_culprit(stage, feed, backend)}"
                        )
            values |= wanted
        _require_finite(program, values)


def difference(received: Mapping[str, Array], wanted: Mapping[str, Array], most: float) -> str | None:
    """What is wrong with the outputs of a stage; None for nothing.

    Args:
        received: outputs of the engine, by name.
        wanted: outputs of the graph. Values that are not finite there, such as those of a mask, may be so in the engine.
        most: relative L2 error of an output.
    """
    for name, value in wanted.items():
        got = received[name]
        if got.shape != value.shape:
            return f"output {name!r} has the shape {list(got.shape)} in the place of {list(value.shape)}"
        finite = np.isfinite(value)
        lost = int((finite & ~np.isfinite(got)).sum())
        if lost:
            return f"output {name!r} has {lost} of {got.size} numbers that are not finite"
        one, other = (np.where(finite, array, 0).astype(np.float64) for array in (got, value))
        error, size = np.linalg.norm(one - other), np.linalg.norm(other)
        if error > most * size and error > np.finfo(np.float32).tiny:
            return f"output {name!r} differs by {error / size if size else np.inf:.2g} of its size (at most {most:g})"
    return None


def tolerance(stage: Stage, backend: Backend) -> float:
    """The largest error of an engine that computes a stage, by the lowest precision of its values and weights."""
    import torch

    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in stage.tensors().values()}
    values = (node.meta.get("val") for node in stage.graph.graph.nodes)
    kinds |= {str(value.dtype).removeprefix("torch.") for value in values if isinstance(value, torch.Tensor)}
    least = TOLERANCE["float32"] if backend.default_device == "cpu" else ON_GPU
    return max([least, *(TOLERANCE.get(kind, 0.0 if kind in EXACT else OTHER_TOLERANCE) for kind in kinds)])


EXACT = ("int64", "int32", "int16", "bool")
"""Kinds of values that no engine rounds: indices, sizes and masks."""


def _calls(program: Program, first: int | None) -> list[int | None]:
    """Grid calls at which every variant runs that a call fixes: the first, and the first of each variant."""
    fixed = [slot.by_call for slot in program.slots if slot.by_call is not None]
    return list(
        dict.fromkeys([first, *(numbers.index(number) for numbers in fixed for number in sorted(set(numbers)))])
    )


def _unassigned(slot: Slot) -> set[int]:
    """The variants of a slot that no call fixes."""
    return set(range(len(slot.variants))) - set(slot.by_call or (0,))


def _named(stage: Stage, values: Sequence[Array]) -> dict[str, Array]:
    return {port.name: np.asarray(value) for port, value in zip(stage.outputs, values, strict=True)}


def _require_finite(program: Program, values: Mapping[str, Array]) -> None:
    for name in program.outputs:
        if name in values and not np.isfinite(values[name]).all():
            raise StepfoldError(
                f"output {name!r}: expected finite numbers of the captured graph for the example inputs; some are not. "
                "Give other inputs with --inputs FILE.safetensors, or check the weights."
            )


def _culprit(stage: Stage, feed: Mapping[str, Array], backend: Backend) -> str:
    """The operator at which a stage goes wrong and the smallest part that does, as a sentence."""
    from ..backends.export import where

    with tempfile.TemporaryDirectory(prefix="stepfold-") as scratch:
        trials = _Trials(stage, feed, backend, Path(scratch))
        end = trials.first_wrong()
        if end is None:
            return "No part of it fails alone."
        found = trials.smallest(end)
        if found is None:
            return f"It goes wrong at {where(end)}, {end.target}; no small part of it fails alone."
        part, file = found
        data = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        kept = Path(tempfile.gettempdir()) / f"stepfold-wrong-{data}"
        shutil.copytree(file.parent, kept, dirs_exist_ok=True)
    nodes = [node for node in part.graph.graph.nodes if node.op == "call_function"]
    kinds = ", ".join(dict.fromkeys(str(node.target) for node in nodes))
    return (
        f"It goes wrong at {where(end)}, {end.target}. The smallest part that fails has {len(nodes)} operators ({kinds}): "
        f"{kept / file.name}"
    )


class _Trials:
    """Parts of a stage, compiled and compared one at a time."""

    def __init__(self, stage: Stage, feed: Mapping[str, Array], backend: Backend, folder: Path):
        from ..ir.program import reference

        self._stage, self._backend, self._folder = stage, backend, folder
        self._reference: Callable[[Stage], Any] = reference
        self._values = _values(stage, feed)
        self._count = 0

    def first_wrong(self) -> fx.Node | None:
        """The first node, in the order of the graph, whose value differs when everything before it is computed too.

        Found by bisection: what is computed from a wrong value is taken to be wrong.
        """
        everything = list(self._stage.graph.graph.nodes)
        ends = [node for node in everything if node.op == "call_function" and node in self._values]
        low, high = 0, len(ends) - 1
        if high < 0 or self._fails(ends[high], everything) is None:
            return None
        while low < high:
            middle = (low + high) // 2
            if self._fails(ends[middle], everything) is not None:
                high = middle
            else:
                low = middle + 1
        return ends[high]

    def smallest(self, end: fx.Node) -> tuple[Stage, Path] | None:
        """The smallest part that ends at a node and fails, with what the nodes before it compute as its inputs."""
        nearest: list[fx.Node] = []
        ring = [end]
        while ring and len(nearest) < SIZES[-1]:
            nearest += ring
            found = dict.fromkeys(source for node in ring for source in node.all_input_nodes)
            ring = [node for node in found if node.op == "call_function" and node not in nearest]
        for size in (size for size in SIZES if size <= len(nearest)):
            failed = self._fails(end, nearest[:size])
            if failed is not None:
                return failed
        return None

    def _fails(self, end: fx.Node, nodes: Collection[fx.Node]) -> tuple[Stage, Path] | None:
        """The compiled part, where it computes something else than its graph."""
        from ..ir.window import window

        self._count += 1
        folder = self._folder / f"{self._count}"
        folder.mkdir()
        try:
            part, read = window(self._stage, end, nodes)
            feed = {node.name: self._values[node] for node in read}
            file = self._backend.lower(part, folder)
            received = self._backend.open_session(file, part.inputs, part.outputs)(feed)
            computed = self._backend.prepared(part)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001  (a part that cannot be compiled alone, for whatever reason, tells nothing)
            return None
        wanted = _named(part, self._reference(computed)(feed))
        fault = difference(_named(part, received), wanted, tolerance(computed, self._backend))
        return None if fault is None else (part, file)


def _values(stage: Stage, feed: Mapping[str, Array]) -> dict[fx.Node, Array]:
    """What every node of a stage computes, as far as it is a tensor that engines take."""
    import torch
    from torch import fx

    found: dict[fx.Node, Array] = {}

    class Noted(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and n.op != "get_attr":
                found[n] = value.detach().float().numpy() if value.dtype is torch.bfloat16 else value.detach().numpy()
            return value

    with torch.no_grad():
        Noted(stage.graph).run(*(torch.from_numpy(np.ascontiguousarray(feed[port.name])) for port in stage.inputs))
    return found
