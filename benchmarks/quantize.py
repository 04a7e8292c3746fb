"""Size, time of an evaluation and PSNR of every quantization recipe on the reference checkpoint, over all its steps.

    python benchmarks/quantize.py [--rows "int8;w4-gptq"] [--repeats 5] [--seed 12345]

Beside the shipped recipes stand what 4 bits are compared with, and `mixed` at the bits of two uniform ones. Prints the
table of docs/performance.md.
"""

from __future__ import annotations

from evaluations import Row, run

from stepfold.loop.errors import UsageError
from stepfold.passes.quantize.modelopt.environment import find
from stepfold.passes.recipe import load_recipe
from stepfold.runtime.compiler import cache_folder

COMPARED: dict[str, dict[str, object]] = {
    "w4-nearest": {"scheme": "int4", "group": 64, "hoisted": "int8"},
    "w4-gptq, groups of 16": {"scheme": "int4", "rounding": "gptq", "group": 16, "hoisted": "int8"},
    "w4-gptq, in sequence": {"scheme": "int4", "rounding": "sequential-gptq", "group": 64, "hoisted": "int8"},
    "w4-svdquant, in sequence": {"scheme": "svdquant", "rounding": "sequential-gptq", "hoisted": "int8"},
    "modelopt": {"scheme": "modelopt", "smooth": 0.7},
    "modelopt, int4": {"scheme": "modelopt", "format": "int4"},
    "modelopt, fp8": {"scheme": "modelopt", "format": "fp8"},
    "mixed, 0.6 of the time": {"scheme": "mixed", "time": 0.6, "smooth": 0.7},
    "mixed, 6 bits": {"scheme": "mixed", "bits": 6.0, "smooth": 0.7, "hoisted": "int8"},
    "mixed, 8.15 bits": {"scheme": "mixed", "bits": 8.15, "smooth": 0.7},
}
"""Options of `quantize` that are no shipped recipe: 6 bits is 4 and a scale for 16 weights, 8.15 is int8 here."""
RECIPES = (
    "int8",
    "int8-static",
    "modelopt",
    "modelopt, fp8",
    "modelopt, int4",
    "mixed, 8.15 bits",
    "mixed, 0.6 of the time",
    "w4-nearest",
    "w4-gptq",
    "w4-gptq, in sequence",
    "w4-svdquant",
    "w4-svdquant, in sequence",
    "w4-gptq, groups of 16",
    "mixed, 6 bits",
    "mixed",
    "trt-fp8",
)


def row(name: str) -> Row:
    """A recipe on ONNX Runtime, without its schedule."""
    if name in COMPARED:
        return Row(name, ({"hoist": {}}, {"quantize": COMPARED[name]}, {"fuse": {}}))
    return Row(name, tuple(entry for entry in load_recipe(name).document()["passes"] if "schedule" not in entry))


def can_build(name: str) -> bool:
    """Whether this machine can: those of modelopt need an environment of its own (docs/passes/modelopt.md)."""
    try:
        return not name.startswith("modelopt") or bool(find(cache_folder()))
    except UsageError:
        return False


if __name__ == "__main__":
    run(
        __doc__ or "",
        {name: row(name) for name in RECIPES if can_build(name)},
        baselines=("onnxruntime", "onnxruntime-int8"),
    )
