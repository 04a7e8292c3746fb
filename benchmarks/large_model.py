"""Peak memory of compiling a synthetic denoiser of a billion parameters.

    python benchmarks/large_model.py [--blocks 24] [--width 1536]

Writes a DiT with random weights as sharded bfloat16 safetensors, compiles it with `hoist` and int8 `quantize`, and
prints the figures of docs/performance.md: bytes, peak memory of the compiler process, seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOOP = """
inputs: {hidden_states: state, timestep: timestep, class_labels: condition}
sampler: {scheduler: FlowMatchEulerDiscreteScheduler, config: {num_train_timesteps: 1000}, steps: 2,
          set_timesteps: {sigmas: linspace}}
latent: {shape: [4, 4, 4]}
"""
RECIPE = """
name: large
target: {backend: onnxruntime}
passes:
  - hoist: {}
  - quantize: {scheme: int8, activations: dynamic}
"""


def write_checkpoint(folder: Path, blocks: int, width: int) -> int:
    """Save the model; returns its number of parameters."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = DiTTransformer2DModel(
        num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=blocks,
        sample_size=4, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    model.save_pretrained(folder, max_shard_size="1GB")
    (folder / "loop.yaml").write_text(LOOP)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:  # in a process of its own, so that its memory does not count
        print(write_checkpoint(options.write, options.blocks, options.width))
        return
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, recipe, bundle = (Path(scratch) / name for name in ("checkpoint", "large.yaml", "bundle"))
        sizes = ["--blocks", str(options.blocks), "--width", str(options.width)]
        written = subprocess.run(
            [sys.executable, __file__, *sizes, "--write", str(checkpoint)], check=True, capture_output=True, text=True
        )
        parameters = int(written.stdout.split()[-1])
        recipe.write_text(RECIPE)
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, time.perf_counter()
        command = [sys.executable, "-m", "stepfold", "optimize", str(checkpoint), "--out", str(bundle)]
        done = subprocess.run(
            [*command, "--recipe", str(recipe), "--json"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr)
        seconds = time.perf_counter() - start
        peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        result = json.loads(done.stdout)
        full = 4 * parameters
        print(f"parameters            {parameters / 1e9:.3f} G ({full / 1e9:.2f} GB in float32)")
        print(f"peak of the compiler  {peak / 1e9:.2f} GB = {peak / full:.2f} x float32 size")
        print(f"shards written with   {1024 * before / 1e9:.2f} GB")
        print(f"bundle                {sum(stage['bytes'] for stage in result['stages']) / 1e9:.2f} GB of stages")
        print(f"seconds               {seconds:.0f}")
        for record in result["passes"]:
            print(f"{record['name']:<10} {record['outcome']} {record['changed']}, drift {record['drift']:.2e}")


if __name__ == "__main__":
    main()
