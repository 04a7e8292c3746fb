"""Time of an evaluation of a DiT of 39.8 million random weights (DiT-S with 256 tokens), two rows at once.

    python benchmarks/small_dit.py [--rows "onnxruntime int8;openvino int8"] [--repeats 5] [--seed 12345]

Programs without a schedule, beside stock engines and OpenVINO's own quantizer. Prints the table of docs/performance.md;
random weights say nothing about quality: PSNR is that of one sample, which says that nothing broke.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from engines import DYNAMIC, FLOAT, STATIC
from evaluations import Model, Row, run

LOOP = """
inputs: {hidden_states: state, timestep: timestep, class_labels: condition}
sampler: {scheduler: FlowMatchEulerDiscreteScheduler, config: {num_train_timesteps: 1000}, steps: 8,
          set_timesteps: {sigmas: linspace}}
guidance: {scale: 2.0, unconditional: {class_labels: 1000}}
latent: {shape: [4, 32, 32]}
"""
STEPS = 8
BASELINES = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-bf16", "openvino-int8")
ROWS = {
    "onnxruntime fp32": Row("onnxruntime-fp32", FLOAT),
    "onnxruntime int8": Row("onnxruntime-int8-smooth", DYNAMIC),
    "openvino int8": Row("openvino-int8-smooth", DYNAMIC, "openvino"),
    "openvino int8, symmetric scales": Row("openvino-int8-symmetric", STATIC, "openvino"),
    "openvino int8, symmetric scales, bf16": Row(
        "openvino-int8-bf16", STATIC, "openvino", (("openvino", "precision", "bf16"),)
    ),
    "openvino int8, symmetric scales, bf16, static shapes": Row(
        "openvino-int8-bf16-static",
        STATIC,
        "openvino",
        (("openvino", "precision", "bf16"), ("openvino", "shapes", "static")),
    ),
}


def write_checkpoint(folder: Path) -> None:
    """Save the model and its loop."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=12,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    model.save_pretrained(folder)
    (folder / "loop.yaml").write_text(LOOP)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--write", type=Path)
    options, _ = parser.parse_known_args()
    if options.write:
        write_checkpoint(options.write)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch) / "dit"
            subprocess.run([sys.executable, __file__, "--write", str(checkpoint)], check=True)
            run(__doc__ or "", ROWS, BASELINES, Model(checkpoint, STEPS, 1, trained=False))
