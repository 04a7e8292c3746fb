"""The worst 8-bit codes against exact integers: every form in which an engine multiplies 8-bit by 8-bit numbers.

    python benchmarks/worst_codes.py

Prints the table of docs/processors.md: the largest error relative to the largest exact result, on this processor
and on an emulated one without VNNI. Inductor has no row: it multiplies floats, and its native code runs only on processors
that have its instructions. Layers are lowered as in a bundle; the rows "as written" leave out the look at the
codes, and show what it is for.
"""

from __future__ import annotations

import json
import operator
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import fx

from stepfold.backends.instructions import instructions
from stepfold.backends.onnx.emit import emit
from stepfold.backends.onnxruntime import lower as onnxruntime
from stepfold.backends.registry import get
from stepfold.ir.blocked import pack_blocks
from stepfold.ir.program import Stage, reference
from stepfold.ir.shapes import port, propagate
from stepfold.loop.ports import Port, Rate
from stepfold.report.emulation import without_vnni

M, N, T = 384, 32, 16
PAIRS = {"64, 64": (64, 64), "127, 1": (127, 1), "65, 64": (65, 64), "127, 127": (127, 127)}
"""Codes of neighbours; the first two are as large as pairs of our own schemes become."""
BLOCKS = {8: (16, 32, 128), 4: (16, 32, 128), 2: (16, 32, 128)}

OPEN = """
import json, sys
from pathlib import Path
import numpy as np
from stepfold.backends.registry import get
from stepfold.loop.ports import Port
jobs, (T, M, N) = json.loads(sys.argv[1])
for engine, file, array in jobs:
    x, y = Port("x", (None, T, M), "float32"), Port("y", (None, T, N), "float32")
    session = get(engine).open_session(Path(file), (x,), (y,), threads=1)
    np.save(array + ".out.npy", session({"x": np.load(array)})[0])
"""


@dataclass
class Case:
    """A layer with its worst codes.

    Attributes:
        engine: name of the backend.
        form: what is multiplied, for the table.
        codes: for the table.
        stage: the layer.
        x: [2, T, M] float32, activations that add up to most.
        lower: what writes the stage into a folder.
    """

    engine: str
    form: str
    codes: str
    stage: Stage
    x: np.ndarray
    lower: Callable[[Stage, Path], Path]


def main() -> None:
    """Lower every case, run all of them here and emulated, print."""
    warnings.simplefilter("ignore")
    found = list(cases())
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [_written(case, Path(scratch) / str(i)) for i, case in enumerate(found)]
        argument = json.dumps([jobs, [T, M, N]])
        subprocess.run([sys.executable, "-c", OPEN, argument], check=True)
        here = [np.load(f"{array}.out.npy") for _, _, array in jobs]
        without_vnni("-c", OPEN, argument)
        there = [np.load(f"{array}.out.npy") for _, _, array in jobs]
    print(f"this processor: {', '.join(instructions())}\n")
    print("| engine | products | codes of a pair | error here | error without VNNI |\n|---|---|---|---|---|")
    for case, *results in zip(found, here, there, strict=True):
        exact = reference(case.stage)({"x": case.x})[0]
        errors = [f"{np.abs(result - exact).max() / np.abs(exact).max():.0e}" for result in results]
        print(f"| {case.engine} | {case.form} | {case.codes} | {' | '.join(errors)} |")


def _written(case: Case, folder: Path) -> tuple[str, str, str]:
    folder.mkdir()
    np.save(folder / "x.npy", case.x)
    return case.engine, str(case.lower(case.stage, folder)), str(folder / "x.npy")


def cases() -> Iterator[Case]:
    """Every engine that runs here, every form, every pair of codes."""
    for engine in ("onnxruntime", "openvino"):
        backend = get(engine)
        if not backend.capability().can_run:
            continue
        for codes, pair in PAIRS.items():
            for form, dtype in (("u8 x s8, dynamic scale", None), ("u8 x s8", torch.uint8), ("s8 x s8", torch.int8)):
                yield Case(engine, form, codes, layer(pair, dtype), activations(dtype), backend.lower)
            if engine == "onnxruntime":
                stage = layer(pair, torch.uint8)
                yield Case(engine, "u8 x s8, as written", codes, stage, activations(torch.uint8), _as_written)
        for bits, sizes in BLOCKS.items():
            if engine != "onnxruntime" and bits == 2:
                continue
            for size in sizes:
                form = f"{bits} bits in blocks of {size}, activations rounded"
                yield Case(engine, form, "largest", blocked(bits, size), rounded(size), backend.lower)


def _as_written(stage: Stage, folder: Path) -> Path:
    emit(stage, folder / "step.onnx", onnxruntime.LOWERINGS)
    return folder / "step.onnx"


def activations(dtype: torch.dtype | None) -> np.ndarray:
    """[2, T, M] whole numbers near the largest of a type, so that rounding them is exact."""
    largest = 127 if dtype is torch.int8 else 255
    x = np.random.default_rng(0).integers(largest - 8, largest + 1, (2, T, M)).astype(np.float32)
    x[:, :, 0], x[:, :, 5] = largest, 0
    return x


def rounded(block: int) -> np.ndarray:
    """[2, T, M] whole numbers, the largest of each block 127, so that rounding by token and block is exact."""
    x = np.random.default_rng(0).integers(120, 128, (2, T, M)).astype(np.float32)
    x[:, :, ::block] = 127
    return x


def layer(pair: tuple[int, int], dtype: torch.dtype | None) -> Stage:
    """An integer layer whose even and odd input channels have one code each, half of the outputs negated."""
    codes = torch.tensor(pair, dtype=torch.int8).repeat(M // 2)[:, None].expand(M, N).clone()
    codes[:, N // 2 :] *= -1
    held = {"codes": codes, "weight_scale": torch.full((N,), 2.0**-7)}
    if dtype is not None:
        held |= {"scale": torch.tensor(1.0), "zero": torch.zeros((), dtype=dtype)}

    def write(graph: fx.Graph, x: fx.Node) -> fx.Node:
        if dtype is None:
            triple = graph.call_function(torch.ops.stepfold.quantize_dynamic.default, (x,))
            q, scale, zero = (graph.call_function(operator.getitem, (triple, i)) for i in range(3))
        else:
            scale, zero = graph.get_attr("scale"), graph.get_attr("zero")
            q = graph.call_function(torch.ops.stepfold.quantize_static.default, (x, scale, zero))
        arguments = (q, scale, zero, graph.get_attr("codes"), graph.get_attr("weight_scale"), None)
        return graph.call_function(torch.ops.stepfold.qlinear.default, arguments)

    return _stage(held, write)


def blocked(bits: int, block: int) -> Stage:
    """A layer of the largest codes in blocks, half of the outputs of the smallest."""
    codes = torch.full((N, M), 2**bits - 1, dtype=torch.uint8)
    codes[N // 2 :] = 0
    held = {"blocks": pack_blocks(codes, bits, block), "scales": torch.full((N, M // block), 2.0**-7)}

    def write(graph: fx.Graph, x: fx.Node) -> fx.Node:
        arguments = (x, graph.get_attr("blocks"), graph.get_attr("scales"), None, None, bits, block, True)
        return graph.call_function(torch.ops.stepfold.blocked_linear.default, arguments)

    return _stage(held, write)


def _stage(held: dict[str, torch.Tensor], write: Callable[[fx.Graph, fx.Node], fx.Node]) -> Stage:
    root, graph = torch.nn.Module(), fx.Graph()
    for name, value in held.items():
        root.register_buffer(name, value)
    result = write(graph, graph.placeholder("x"))
    graph.output((result,))
    module, inputs = fx.GraphModule(root, graph), (Port("x", (None, T, M), "float32"),)
    propagate(module, inputs)
    return Stage("step", Rate.STEP, module, inputs, (port(result, "y"),))


if __name__ == "__main__":
    main()
