"""What the layers of a group cost on the engine, measured."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
from pydantic import JsonValue
from torch import fx

from ...backends.identity import packages, processor
from ...bundle.cache import Cache, key_of
from ...ir.program import ModelIdentity, Program, Stage, slots_of
from ...ir.shapes import PROBE_BATCHES, propagate
from ...loop.errors import UsageError
from ...loop.ports import InputPort, Port, Rate
from ..base import Context
from .layers import LINEAR, Group, LinearLayer
from .realize import Realization
from .rewrite import replaced_in

ROWS = 16
"""Rows at once: 8 samples with both branches of guidance."""
TURNS, UNTIMED = 15, 3
"""Calls of each format, which take turns, so that a slow moment of the machine meets all of them."""
SOURCE = "x"

Formats = Mapping[str, Realization | None]


class Durations:
    """Nanoseconds of one call of the layers of a group in each format, alone on the engine.

    Groups of equal shapes cost the same and are measured once. What was measured is kept, by the engine, its version
    and the processor, so that another build on this machine decides the same.
    """

    def __init__(self, context: Context):
        """Measure with the engine of a pass.

        Raises:
            UsageError: the engine cannot run on this machine.
        """
        if context.fitted_on != "engine":
            raise UsageError(
                f"pass quantize: option 'time': expected an engine that runs on this machine; {context.engine_name} "
                "does not. Build there, or give `bits` in its place."
            )
        self._context = context

    def of(self, group: Group, formats: Formats) -> dict[str, int]:
        """Nanoseconds by format; a format whose realization is None is the layers in floats."""
        kept, parts = Cache(self._context.cache / "durations", "duration"), self._parts(group, formats)
        content = kept.read(key_of(parts))
        if content is not None:
            return json.loads(content)
        found = self._measured(group, formats)
        kept.write(key_of(parts), f"of {group.name}", parts, "durations.json", json.dumps(found).encode())
        return found

    def _parts(self, group: Group, formats: Formats) -> dict[str, JsonValue]:
        """All that a duration depends on, the values of weights not included."""
        stages = [lone_stage(group, item) for item in formats.values()]
        return {
            "engine": self._context.engine_name,
            "packages": dict(packages()),
            "processor": dict(processor()),
            "formats": list[JsonValue](formats),
            "layers": [list[JsonValue](_outline(stage)) for stage in stages],
        }

    def _measured(self, group: Group, formats: Formats) -> dict[str, int]:
        calls = {name: self._call(lone_stage(group, item)) for name, item in formats.items()}
        for call in calls.values():
            for _ in range(UNTIMED):
                call()
        seen: dict[str, list[int]] = {name: [] for name in calls}
        for _ in range(TURNS):
            for name, call in calls.items():
                start = time.perf_counter_ns()
                call()
                seen[name].append(time.perf_counter_ns() - start)
        return {name: int(statistics.median(values)) for name, values in seen.items()}

    def _call(self, stage: Stage) -> Callable[[], object]:
        program = Program(
            slots=slots_of(stage),
            inputs=tuple(InputPort(port, "state") for port in stage.inputs),
            outputs=tuple(port.name for port in stage.outputs),
            example={},
            model=ModelIdentity("Linear", ""),
        )
        bound = self._context.engine(program)
        feed = {port.name: _values(port) for port in stage.inputs}
        return lambda: bound.evaluate(feed)


def lone_stage(group: Group, realization: Realization | None) -> Stage:
    """A stage of nothing but the layers of a group: x [B, T, M] -> one [B, T, N] for each layer.

    Args:
        group: group of a stage, which it shares the weights with.
        realization: realization of the group; None leaves the layers in floats.
    """
    graph = fx.Graph()
    source = graph.placeholder(SOURCE)
    layers = tuple(_copied(graph, layer, source) for layer in group.layers)
    graph.output(tuple(layer.node for layer in layers))
    module = fx.GraphModule(group.layers[0].node.graph.owning_module, graph)  # type: ignore[arg-type]
    M = group.weight.shape[1]
    tokens = group.source.meta["val"].numel() // (PROBE_BATCHES[0] * M)
    dtype = str(group.weight.dtype).removeprefix("torch.")
    inputs = (Port(SOURCE, (None, tokens, M), dtype),)
    propagate(module, inputs)
    outputs = tuple(Port(f"y{i}", (None, tokens, len(layer.weight)), dtype) for i, layer in enumerate(layers))
    stage = Stage("layers", Rate.STEP, module, inputs, outputs)
    return replaced_in(stage, [Group(layers)], [realization])[0]


def _copied(graph: fx.Graph, layer: LinearLayer, source: fx.Node) -> LinearLayer:
    """The layer in another graph; a bias that is computed is left out."""
    stored = [value for value in layer.node.args[1:] if isinstance(value, fx.Node) and value.op == "get_attr"]
    node = graph.call_function(LINEAR, (source, *(graph.node_copy(value) for value in stored)))
    node.meta = dict(layer.node.meta)
    return LinearLayer(node, layer.name, source, layer.weight)


def _outline(stage: Stage) -> list[str]:
    """Operators, their settings, and shapes and types of what they compute."""
    return [
        f"{node.target if node.op == 'call_function' else node.op} "
        f"{[value for value in node.args if not isinstance(value, fx.Node)] if node.op == 'call_function' else ''} "
        f"{getattr(node.meta.get('val'), 'dtype', '')} {node.meta.get('shape')}"
        for node in stage.graph.graph.nodes
    ]


def _values(port: Port) -> np.ndarray:
    """Normal numbers; one where a table gives a scale or a zero point."""
    shape = [ROWS if size is None else size for size in port.shape]
    if port.name != SOURCE:
        return np.ones(shape, port.dtype)
    return np.random.default_rng(0).standard_normal(shape).astype(port.dtype)
