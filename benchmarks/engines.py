"""Time of an evaluation and PSNR of one program on every engine of this machine, over all steps of the reference.

    python benchmarks/engines.py [--rows "int8;openvino int8"] [--repeats 5] [--seed 12345]

Prints the table of docs/performance.md. Engines that cannot run here have no row.
"""

from __future__ import annotations

from evaluations import Row, run

from stepfold.backends.registry import get

FLOAT = ({"hoist": {}}, {"fuse": {}, "optional": True})
DYNAMIC = ({"hoist": {}}, {"quantize": {"scheme": "int8", "smooth": 0.7}}, {"fuse": {}, "optional": True})
UNFUSED = DYNAMIC[:2]
AS_CAPTURED = DYNAMIC[1:2]
STATIC = (
    {"hoist": {}},
    {"quantize": {"scheme": "int8", "activations": "symmetric", "smooth": 0.7}},
    {"fuse": {}, "optional": True},
)
STATIC_HERE = (
    {"hoist": {}},
    {"quantize": {"scheme": "int8", "activations": "static", "smooth": 0.7}},
    {"fuse": {}, "optional": True},
)
WEIGHTS = ({"hoist": {}}, {"quantize": {"scheme": "int4", "rounding": "gptq"}}, {"fuse": {}, "optional": True})
ROWS = {
    "onnxruntime fp32": Row("onnxruntime-fp32", FLOAT),
    "onnxruntime int8": Row("onnxruntime-int8-smooth", DYNAMIC),
    "onnxruntime int8, not fused": Row("onnxruntime-int8-not-fused", UNFUSED),
    "onnxruntime int8, neither hoisted nor fused": Row("onnxruntime-int8-as-captured", AS_CAPTURED),
    "onnxruntime int8, whole batches": Row(
        "onnxruntime-int8-whole", DYNAMIC, settings=(("onnxruntime", "rows", None),)
    ),
    "onnxruntime int8, static scales": Row("onnxruntime-int8-static", STATIC_HERE),
    "onnxruntime int8, symmetric scales": Row("onnxruntime-int8-symmetric", STATIC),
    "openvino fp32": Row("openvino-fp32", FLOAT, "openvino"),
    "openvino bf16": Row("openvino-bf16", FLOAT, "openvino", (("openvino", "precision", "bf16"),)),
    "openvino int8": Row("openvino-int8", DYNAMIC, "openvino"),
    "openvino int8, symmetric scales": Row("openvino-int8-symmetric", STATIC, "openvino"),
    "openvino int8, symmetric scales, static shapes": Row(
        "openvino-int8-static-shapes", STATIC, "openvino", (("openvino", "shapes", "static"),)
    ),
    "openvino int4": Row("openvino-int4", WEIGHTS, "openvino"),
    "inductor fp32": Row("inductor-fp32", FLOAT, "inductor"),
    "inductor bf16": Row("inductor-bf16", FLOAT, "inductor", (("inductor", "precision", "bf16"),)),
}

if __name__ == "__main__":
    here = {name: row for name, row in ROWS.items() if get(row.backend).capability_here().can_run}
    run(__doc__ or "", here, baselines=("onnxruntime", "onnxruntime-int8"))
