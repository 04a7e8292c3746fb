"""The same bundles on this processor and on an emulated one without VNNI: decibels of each, and between the two.

    python benchmarks/processors.py [--rows "int8;int8, static scales"] [--samples 2] [--seed 12345]

An emulated evaluation takes seconds, so samples are few, and times are not compared. Where this processor has no VNNI
itself, nothing is emulated, and what it would have with VNNI is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from evaluations import REFERENCE, Row
from safetensors.numpy import save_file

from stepfold.backends.instructions import VNNI, instructions
from stepfold.frontend.load import load_checkpoint
from stepfold.loop.budget import QualityBudget
from stepfold.loop.classes import class_conditions
from stepfold.loop.metrics import psnr
from stepfold.loop.noise import noise
from stepfold.loop.plan import fold
from stepfold.report.baselines.build import build, chain, describe
from stepfold.report.emulation import without_vnni
from stepfold.report.work import Work, write
from stepfold.runtime.compiler import Job, optimize
from stepfold.runtime.unoptimized import load_unoptimized

FUSE = {"fuse": {}, "optional": True}


def int8(**options: object) -> tuple:
    """Passes of a row in 8 bits."""
    return ({"hoist": {}}, {"quantize": {"scheme": "int8", "smooth": 0.7, "rounding": "auto", **options}}, FUSE)


ROWS = {
    "int8": Row("int8", int8()),
    "int8, static scales": Row("int8-static", int8(activations="static")),
    "int8, rounded to nearest": Row("int8-nearest", int8(rounding="nearest")),
    "int8, OpenVINO, symmetric scales": Row("openvino-int8", int8(activations="symmetric"), "openvino"),
    "svdquant W4A8": Row("svdquant", ({"hoist": {}}, {"quantize": {"scheme": "svdquant", "rank": 32}}, FUSE)),
    "mixed, 7 bits": Row("mixed", ({"hoist": {}}, {"quantize": {"scheme": "mixed", "bits": 7.0}}, FUSE)),
}
DEFAULT = "default, 40 dB"
BASELINES = {
    "ONNX Runtime, quantize_dynamic": "onnxruntime-int8",
    "ONNX Runtime, quantize_dynamic, reduce_range": "onnxruntime-int8-reduced",
    "NNCF on OpenVINO": "openvino-int8",
}
DRAW_BUNDLE = """
import json, sys
import numpy as np
import stepfold
path, count, seed, out = json.loads(sys.argv[1])
np.save(out, stepfold.load(path, threads=1).generate(count=count, seed=seed))
"""
DRAW_BASELINE = """
import json, sys
from pathlib import Path
import numpy as np
from stepfold.report.baselines.opening import open_baseline
from stepfold.report.work import read_all
row, request, out = json.loads(sys.argv[1])
np.save(out, open_baseline(row, 1).sample(read_all(Path(request))))
"""
Draw = Callable[[Path], tuple[str, str]]
"""The code that draws a row into a file, and its argument."""


def main() -> None:
    """Build, draw here and emulated, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=";".join([*ROWS, DEFAULT, *BASELINES]))
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=12345)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wanted = full_loop(options.samples, options.seed)
        print(f"this processor: {', '.join(instructions())}\n")
        print("| row | dB with VNNI | dB without VNNI | dB between them | largest difference |\n|---|---|---|---|---|")
        for name in options.rows.split(";"):
            prepare = baseline if name in BASELINES else bundle
            draw = prepare(name, Path(scratch), options.samples, options.seed)
            print(f"| {name} | {' | '.join(compared(draw, Path(scratch), wanted))} |", flush=True)


def compared(draw: Draw, scratch: Path, wanted: np.ndarray) -> list[str]:
    """The columns of a row: decibels with VNNI, without, and between the two, and the largest difference."""
    code, argument = draw(scratch / "here.npy")
    subprocess.run([sys.executable, "-c", code, argument], check=True)
    here = np.load(scratch / "here.npy")
    if not set(VNNI) & set(instructions()):
        return ["-", f"{psnr(here, wanted).mean():.1f}", "-", "-"]
    print("drawing emulated", file=sys.stderr)
    without_vnni("-c", *draw(scratch / "there.npy"))
    there = np.load(scratch / "there.npy")
    largest = np.abs(here - there).max() / np.ptp(here)
    return [
        *(f"{psnr(a, b).mean():.1f}" for a, b in ((here, wanted), (there, wanted), (there, here))),
        f"{largest:.0e}",
    ]


def bundle(name: str, scratch: Path, samples: int, seed: int) -> Draw:
    """Build the bundle of a row."""
    print(f"building {name}", file=sys.stderr)
    if name == DEFAULT:
        path = scratch / "default"
        optimize(Job(REFERENCE.checkpoint, path, min_psnr=QualityBudget(mean=40)), lambda task, done, total: None)
    else:
        path = ROWS[name].build(REFERENCE, scratch)
    return lambda out: (DRAW_BUNDLE, json.dumps([str(path), samples, seed, str(out)]))


def baseline(name: str, scratch: Path, samples: int, seed: int) -> Draw:
    """Build the model of another tool, as `stepfold bench` does."""
    print(f"building {name}", file=sys.stderr)
    program = load_checkpoint(REFERENCE.checkpoint).capture()
    assert program.loop is not None and program.recurrence is not None
    work = Work(program.loop, program.inputs, {})
    table, request, folder = scratch / "full.table", scratch / "request", scratch / "baselines"
    save_file(fold(program.recurrence, work.guidance).arrays(), table)
    write(request, work.arrays(samples, seed))
    row = {"checkpoint": str(REFERENCE.checkpoint), "table": str(table), "example": None, **describe(work)}
    for artifact in chain(BASELINES[name]):
        build({**row, "artifact": artifact, "folder": str(folder), "threads": 2}, lambda done, total: None)
    row |= {"engine": BASELINES[name], "artifact": str(folder / BASELINES[name])}
    return lambda out: (DRAW_BASELINE, json.dumps([row, str(request), str(out)]))


def full_loop(count: int, seed: int) -> np.ndarray:
    """Samples of every call of the loop in PyTorch."""
    original = load_unoptimized(REFERENCE.checkpoint)
    conditions = class_conditions(original.program.inputs, original.loop, count)
    return original.sample(noise(seed, (count, *original.loop.noise_shape)), conditions=conditions)


if __name__ == "__main__":
    main()
