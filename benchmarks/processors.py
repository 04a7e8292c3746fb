"""The same bundles on this processor and on an emulated one without VNNI: decibels of each, and between the two.

    python benchmarks/processors.py [--rows "int8;int8, static scales"] [--samples 2] [--seed 12345]

An emulated evaluation takes seconds, so samples are few, and times are not compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from evaluations import REFERENCE, Row

import stepfold
from stepfold.backends.instructions import instructions
from stepfold.loop.classes import class_conditions
from stepfold.loop.metrics import psnr
from stepfold.loop.noise import noise
from stepfold.report.emulation import without_vnni
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
DRAW = """
import json, sys
import numpy as np
import stepfold
path, count, seed = json.loads(sys.argv[1])
np.save(path + ".npy", stepfold.load(path, threads=1).generate(count=count, seed=seed))
"""


def main() -> None:
    """Build, draw here and emulated, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=";".join([*ROWS, DEFAULT]))
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=12345)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wanted = full_loop(options.samples, options.seed)
        print(f"this processor: {', '.join(instructions())}\n")
        print("| row | dB here | dB without VNNI | dB between them | largest difference |\n|---|---|---|---|---|")
        for name in options.rows.split(";"):
            path = build(name, Path(scratch))
            print("drawing emulated", file=sys.stderr)
            without_vnni("-c", DRAW, json.dumps([str(path), options.samples, options.seed]))
            here = stepfold.load(path, threads=1).generate(count=options.samples, seed=options.seed)
            there = np.load(f"{path}.npy")
            largest = np.abs(here - there).max() / np.ptp(here)
            figures = [psnr(a, b).mean() for a, b in ((here, wanted), (there, wanted), (there, here))]
            print(f"| {name} | {' | '.join(f'{value:.1f}' for value in figures)} | {largest:.0e} |", flush=True)


def build(name: str, folder: Path) -> Path:
    """The bundle of a row."""
    print(f"building {name}", file=sys.stderr)
    if name != DEFAULT:
        return ROWS[name].build(REFERENCE, folder)
    optimize(Job(REFERENCE.checkpoint, folder / "default", min_psnr=40.0), lambda task, done, total: None)
    return folder / "default"


def full_loop(count: int, seed: int) -> np.ndarray:
    """Samples of every call of the loop in PyTorch."""
    original = load_unoptimized(REFERENCE.checkpoint)
    conditions = class_conditions(original.program.inputs, original.loop, count)
    return original.sample(noise(seed, (count, *original.loop.latent.shape)), conditions=conditions)


if __name__ == "__main__":
    main()
