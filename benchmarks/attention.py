"""Sparse attention against each engine's own dense attention, on random weights.

    python benchmarks/attention.py [--tokens 4096] [--heads 16] [--width 64] [--keep 0.25,0.125] [--turns 9]

One attention on an image of `tokens` tokens, float32, all cores. Dense: ONNX Runtime's fused form and its form in products,
OpenVINO's own. Sparse: windows of 8 by 8 tiles. Programs take turns; the median counts. Prints the table of
docs/passes/sparsify_attention.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import fx

from stepfold.backends.registry import get
from stepfold.ir.operators.block_sparse_attention import block_sparse_attention
from stepfold.ir.program import Stage
from stepfold.ir.shapes import propagate
from stepfold.loop.ports import Port, Rate
from stepfold.passes.attend.patterns import PATTERNS
from stepfold.passes.attend.patterns.pattern import Place
from stepfold.passes.attend.tiles import Tiles, fitting_tile

aten = torch.ops.aten
DENSE = ("fused", "products")
"""Forms of dense attention; sparse ones are named by the share that they keep."""


def stage_of(form: str, tokens: int, heads: int, width: int) -> Stage:
    """One attention of a form: q, k, v [B, T, H K] -> [B, T, H K]."""
    graph, module = fx.Graph(), torch.nn.Module()
    ports = tuple(Port(name, (None, tokens, heads * width), "float32") for name in "qkv")
    values = [graph.placeholder(port.name) for port in ports]
    if form == "fused":
        result = graph.call_function(torch.ops.stepfold.attention.default, (*values, heads, width**-0.5))
    else:
        split = [_heads(graph, value, tokens, heads, width) for value in values]
        whole = (
            _dense(graph, split, width)
            if form == "products"
            else _sparse(graph, module, split, float(form), tokens, width)
        )
        swapped = graph.call_function(aten.transpose.int, (whole, 1, 2))
        result = graph.call_function(aten.reshape.default, (swapped, (-1, tokens, heads * width)))
    graph.output((result,))
    made = fx.GraphModule(module, graph)
    propagate(made, ports)
    out = Port("y", (None, tokens, heads * width), "float32")
    return Stage("attention", Rate.STEP, made, ports, (out,))


def _heads(graph: fx.Graph, value: fx.Node, tokens: int, heads: int, width: int) -> fx.Node:
    split = graph.call_function(aten.reshape.default, (value, (-1, tokens, heads, width)))
    return graph.call_function(aten.transpose.int, (split, 1, 2))


def _dense(graph: fx.Graph, values: list[fx.Node], width: int) -> fx.Node:
    query, key, value = values
    turned = graph.call_function(aten.transpose.int, (key, 2, 3))
    logits = graph.call_function(
        aten.matmul.default, (graph.call_function(aten.mul.Tensor, (query, width**-0.5)), turned)
    )
    return graph.call_function(aten.matmul.default, (graph.call_function(aten.softmax.int, (logits, -1)), value))


def _sparse(
    graph: fx.Graph, module: torch.nn.Module, values: list[fx.Node], keep: float, tokens: int, width: int
) -> fx.Node:
    side = int(tokens**0.5)
    tile = fitting_tile((1, side, side))
    assert side * side == tokens and tile is not None
    tiles = Tiles((1, side, side), tile)
    order = tiles.order()
    kept = PATTERNS["window"].kept(Place(tiles, keep, lambda: torch.zeros(0)))
    for name, table in (("order", order), ("inverse", order.argsort()), ("kept", kept)):
        module.register_buffer(name, table)
    tables = [graph.get_attr(name) for name in ("order", "inverse", "kept")]
    return graph.call_function(block_sparse_attention.overload, (*values, *tables, None, 0, tiles.block, width**-0.5))


class Opened:
    """A form of attention on an engine, ready to run."""

    def __init__(self, backend: str, form: str, shape: tuple[int, int, int], folder: Path):
        stage, engine = stage_of(form, *shape), get(backend)
        folder.mkdir()
        path = engine.lower(stage, folder)
        self._call = engine.open_session(path, stage.inputs, stage.outputs, threads=None)
        draw = np.random.default_rng(0).standard_normal
        self._inputs = {port.name: draw((1, *port.shape[1:])).astype(np.float32) for port in stage.inputs}

    def seconds(self) -> float:
        """What one call takes."""
        start = time.perf_counter()
        self._call(self._inputs)
        return time.perf_counter() - start


def in_turns(backend: str, forms: list[str], shape: tuple[int, int, int], turns: int) -> dict[str, float]:
    """Median seconds of each form; the first call of each is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        opened = {form: Opened(backend, form, shape, Path(folder) / form) for form in forms}
        times = [{form: one.seconds() for form, one in opened.items()} for _ in range(turns + 1)]
    return {form: statistics.median(row[form] for row in times[1:]) for form in forms}


def peak_bytes(backend: str, form: str, shape: tuple[int, int, int]) -> int:
    """What the first call of a form adds to the largest memory of the process."""
    with tempfile.TemporaryDirectory() as folder:
        opened = Opened(backend, form, shape, Path(folder) / form)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        opened.seconds()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def of_its_own(*arguments: str) -> str:
    """What this script prints in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--keep", default="0.25,0.125")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--backends", default="onnxruntime,openvino")
    parser.add_argument("--times", metavar="BACKEND", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, metavar=("BACKEND", "FORM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = options.tokens, options.heads, options.width
    forms = [*DENSE, *options.keep.split(",")]
    if options.times:
        print(json.dumps(in_turns(options.times, forms, shape, options.turns)))
    elif options.memory:
        print(peak_bytes(*options.memory, shape))
    else:
        report(options.backends.split(","), forms)


def report(backends: list[str], forms: list[str]) -> None:
    """Print the table."""
    print("| engine | form | ms | times as fast as the best dense form | MB of its first call |\n|---|---|---|---|---|")
    for backend in backends:
        seconds = json.loads(of_its_own("--times", backend).splitlines()[-1])
        best = min(seconds[form] for form in DENSE)
        for form in forms:
            name = form if form in DENSE else f"window, {float(form):.1%} of the blocks"
            peak = int(of_its_own("--memory", backend, form).splitlines()[-1])
            print(
                f"| {backend} | {name} | {1000 * seconds[form]:.0f} | {best / seconds[form]:.2f} | {peak / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
