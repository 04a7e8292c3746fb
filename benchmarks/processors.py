"""The same bundles on this processor and on an emulated one without VNNI: decibels of int8, ours and that of others.

    python benchmarks/processors.py [--rows "default;int8"] [--quality-count 16] [--repeats 3] [--seed 12345]

Prints the table of docs/processors.md. Everything is built once, by this processor. Times are those of this processor,
in one run, because an emulation has none; quality is over samples of a seed used for nothing else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from evaluations import REFERENCE, Row

from stepfold.backends.instructions import instructions
from stepfold.report.bench import bench
from stepfold.report.emulation import command
from stepfold.report.processes import COMMAND
from stepfold.runtime.compiler import Job, cache_folder, optimize

INT8 = ({"hoist": {}}, {"quantize": {"scheme": "int8", "smooth": 0.7}}, {"fuse": {}, "optional": True})
SYMMETRIC = (
    {"hoist": {}},
    {"quantize": {"scheme": "int8", "activations": "symmetric", "smooth": 0.7}},
    {"fuse": {}, "optional": True},
)
SVDQUANT = ({"hoist": {}}, {"quantize": {"scheme": "svdquant", "rank": 32}}, {"fuse": {}, "optional": True})
MIXED = ({"hoist": {}}, {"quantize": {"scheme": "mixed", "bits": 7.0}}, {"fuse": {}, "optional": True})
ROWS = {
    "int8": Row("int8", INT8),
    "int8, OpenVINO, symmetric scales": Row("openvino-int8-symmetric", SYMMETRIC, "openvino"),
    "int8, OpenVINO, dynamic scales": Row("openvino-int8-dynamic", INT8, "openvino"),
    "mixed, 7 bits": Row("mixed", MIXED),
    "svdquant W4A8": Row("svdquant", SVDQUANT),
}
DEFAULT = "default, 40 dB"
BASELINES = {
    "*ONNX Runtime stock int8*": "onnxruntime-int8",
    "*the same with reduce_range*": "onnxruntime-int8-reduced",
    "*NNCF int8 on OpenVINO*": "openvino-int8",
}


def main() -> None:
    """Build, measure here and emulated, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=";".join([*ROWS, DEFAULT]))
    parser.add_argument("--quality-count", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=12345)
    options = parser.parse_args()
    chosen = options.rows.split(";")
    with tempfile.TemporaryDirectory() as scratch:
        bundles = {name: build(name, Path(scratch)) for name in chosen}
        here = measured(list(bundles.values()), options, COMMAND, options.repeats)
        there = measured(list(bundles.values()), options, command(*COMMAND[1:]), 1)
    print(f"this processor: {', '.join(instructions())}\n")
    print("| row | ms for 10 images, here | dB here (worst) | dB without VNNI (worst) |\n|---|---|---|---|")
    for name, key in {**{name: bundles[name].name for name in chosen}, **BASELINES}.items():
        milliseconds = here[key]["latency_ms"]["median"]
        print(f"| {name} | {milliseconds:.0f} | {decibels(here[key])} | {decibels(there[key])} |")


def build(name: str, folder: Path) -> Path:
    """The bundle of a row."""
    print(f"building {name}", file=sys.stderr)
    if name != DEFAULT:
        return ROWS[name].build(REFERENCE, folder)
    optimize(Job(REFERENCE.checkpoint, folder / "default", min_psnr=40.0), lambda task, done, total: None)
    return folder / "default"


def measured(bundles: list[Path], options: argparse.Namespace, worker: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """The rows of one bench by name; the second finds model files and reference samples of the first."""
    report = bench(
        bundles,
        reference=REFERENCE.checkpoint,
        baselines=tuple(BASELINES.values()),
        count=REFERENCE.count,
        quality_count=options.quality_count,
        repeats=repeats,
        seed=options.seed,
        cache=cache_folder(),
        command=worker,
    )
    return {row["name"]: row for row in report.document()["rows"]}


def decibels(row: dict[str, Any]) -> str:
    """Mean PSNR and that of the worst sample."""
    return f"{row['psnr_db']['mean']:.1f} ({row['psnr_db']['min']:.1f})"


if __name__ == "__main__":
    main()
