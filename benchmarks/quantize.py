"""Size, time of an evaluation and PSNR of every quantization recipe on the reference checkpoint, over all its steps.

    python benchmarks/quantize.py [--recipes fp32,int8,...] [--repeats 5] [--seed 12345]

Each recipe is compiled without its `schedule`, so that all evaluate every call of the sampler and nothing is fitted to
their errors. The bundles, the float32 model and stock dynamic quantization run in processes of their own and take
turns. Quality is over samples of a seed used for nothing else. Prints the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from stepfold.passes.recipe import load_recipe
from stepfold.report.bench import bench
from stepfold.runtime.compiler import Job, cache_folder, optimize

REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "mnist_dit"
RECIPES = ("int8", "int8-static", "w4-nearest", "w4-gptq", "w4-svdquant", "mixed", "trt-fp8")
BASELINES = ("onnxruntime", "onnxruntime-int8")
STEPS = 50
NEAREST = {"name": "w4-nearest", "passes": [{"hoist": {}}, {"quantize": {"scheme": "int4"}}, {"fuse": {}}]}
"""4-bit weights rounded to nearest: what the methods of 4 bits are compared with; not a recipe anyone should use."""


def build(name: str, folder: Path) -> Path:
    """The bundle of a recipe without its schedule."""
    document = NEAREST if name == "w4-nearest" else load_recipe(name).document()
    passes = [entry for entry in document["passes"] if "schedule" not in entry]
    recipe = {"name": name, "passes": passes}
    out = folder / name
    optimize(Job(REFERENCE, out, recipe=recipe, backend="onnxruntime"), lambda task, done, total: None)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=12345)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundles = [build(name, Path(scratch)) for name in options.recipes.split(",")]
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
