"""Time of a norm of a sum on ONNX Runtime: one contrib operator, or an addition and a norm.

    python benchmarks/norms.py [--repeats 60]

Values of a million bytes in rows of several widths, on one thread, the two in turns. Prints the table of
docs/backends/onnxruntime.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stepfold.backends.onnxruntime.session import on, session_options

if TYPE_CHECKING:
    import onnxruntime

WIDTHS = (192, 768, 3072)
VALUES = 250_000
CPU = ("CPUExecutionProvider",)


def open_model(nodes: Sequence[onnx.NodeProto], width: int) -> onnxruntime.InferenceSession:
    """A session over x and y [rows, width] with weights of a norm."""
    import onnxruntime

    weights = [numpy_helper.from_array(np.full(width, v, np.float32), name) for name, v in (("one", 1), ("zero", 0))]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "rows", width]) for name in ("x", "y")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("normed", "sum")]
    graph = helper.make_graph(nodes, "norm", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), session_options(1), **on(CPU))


def forms(width: int) -> dict[str, onnxruntime.InferenceSession]:
    """Both forms of the same values."""
    weights, epsilon = ["one", "zero"], 1e-6
    one = helper.make_node(
        "SkipLayerNormalization",
        ["x", "y", *weights],
        ["normed", "", "", "sum"],
        epsilon=epsilon,
        domain="com.microsoft",
    )
    two = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", *weights], ["normed"], epsilon=epsilon),
    ]
    return {"one": open_model([one], width), "two": open_model(two, width)}


def measure(width: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each form."""
    values = np.random.default_rng(0).standard_normal((2, 1, VALUES // width, width)).astype(np.float32)
    feed, sessions = dict(zip(("x", "y"), values, strict=True)), forms(width)
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(repeats):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feed)
            found[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    repeats = parser.parse_args().repeats
    print("| rows x width | `SkipLayerNormalization` | `Add`, `LayerNormalization` | ratio |\n|---|---|---|---|")
    for width in WIDTHS:
        found = measure(width, repeats)
        print(
            f"| {VALUES // width} x {width} | {found['one']:.2f} ms | {found['two']:.2f} ms | "
            f"{found['one'] / found['two']:.1f}x |"
        )


if __name__ == "__main__":
    main()
