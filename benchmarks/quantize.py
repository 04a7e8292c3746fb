"""Size, time of an evaluation and PSNR of every quantization recipe on the reference checkpoint, over all its steps.

    python benchmarks/quantize.py [--recipes "int8;w4-gptq"] [--repeats 5] [--seed 12345]

Each recipe is compiled without its `schedule`, so that all evaluate every call of the sampler and nothing is fitted to
their errors. The bundles, the float32 model and stock dynamic quantization run in processes of their own and take
turns. Quality is over samples of a seed used for nothing else. Beside the shipped recipes stand what 4 bits are compared
with, and `mixed` at the bits of two uniform ones. Prints the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from stepfold.passes.recipe import load_recipe
from stepfold.report.bench import bench
from stepfold.runtime.compiler import Job, cache_folder, optimize

REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "mnist_dit"
BASELINES = ("onnxruntime", "onnxruntime-int8")
STEPS = 50
COMPARED: dict[str, dict[str, object]] = {
    "w4-nearest": {"scheme": "int4", "group": 64, "hoisted": "int8"},
    "w4-gptq, groups of 16": {"scheme": "int4", "rounding": "gptq", "group": 16, "hoisted": "int8"},
    "mixed, 6 bits": {"scheme": "mixed", "bits": 6.0, "smooth": 0.7, "hoisted": "int8"},
    "mixed, 8.15 bits": {"scheme": "mixed", "bits": 8.15, "smooth": 0.7},
}
"""Options of `quantize` that are no shipped recipe: 6 bits is 4 and a scale for 16 weights, 8.15 is int8 here."""
RECIPES = (
    "int8",
    "int8-static",
    "mixed, 8.15 bits",
    "w4-nearest",
    "w4-gptq",
    "w4-svdquant",
    "w4-gptq, groups of 16",
    "mixed, 6 bits",
    "mixed",
    "trt-fp8",
)


def build(name: str, folder: Path) -> Path:
    """The bundle of a recipe without its schedule."""
    if name in COMPARED:
        passes: list[Any] = [{"hoist": {}}, {"quantize": COMPARED[name]}, {"fuse": {}}]
    else:
        passes = [entry for entry in load_recipe(name).document()["passes"] if "schedule" not in entry]
    recipe = {"name": "quantized", "passes": passes}
    out = folder / name
    optimize(Job(REFERENCE, out, recipe=recipe, backend="onnxruntime"), lambda task, done, total: None)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", default=";".join(RECIPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=12345)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundles = [build(name, Path(scratch)) for name in options.recipes.split(";")]
        report = bench(
            bundles,
            reference=REFERENCE,
            baselines=BASELINES,
            count=10,
            repeats=options.repeats,
            seed=options.seed,
            cache=cache_folder(),
        ).document()
    rows = {row["name"]: row for row in report["rows"]}
    whole = rows["onnxruntime"]["latency_ms"]["median"]
    print("| recipe | ms for an evaluation, batch 20 | over float32 | PSNR | bytes |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        milliseconds = row["latency_ms"]["median"]
        print(
            f"| {name} | {milliseconds / STEPS:.1f} | {whole / milliseconds:.2f}x | {row['psnr_db']['mean']:.1f} dB | "
            f"{row['size_bytes'] / 1e6:.1f} MB |"
        )


if __name__ == "__main__":
    main()
