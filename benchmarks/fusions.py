"""Time of an evaluation with every fusion, and without one of them, on ONNX Runtime.

    python benchmarks/fusions.py [--models "FLUX;UNet"] [--repeats 10] [--seed 12345]

Models of random weights that have the patterns, compiled with all rules and without one of them. The programs of a model
are measured in one run, each in a process of its own, in turns. `group norm` is no rule but a lowering. Prints the table
of docs/passes/fuse.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from evaluations import compiled

from stepfold.backends.onnxruntime.lower import LOWERINGS
from stepfold.frontend.load import load_checkpoint
from stepfold.ir.program import Program
from stepfold.passes.fuse.fuse import FuseOptions
from stepfold.report.bench import bench

STEPS = 4
FLOW = {
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "config": {"num_train_timesteps": 1000},
    "steps": STEPS,
    "set_timesteps": {"sigmas": "linspace"},
}
GROUP_NORM = torch.ops.aten.group_norm.default
SIDE = 16  # tokens of an image along each of its sides
TEXT = {"role": "condition", "dtype": "float32"}


@dataclass(frozen=True)
class Network:
    """A diffusers class with the loop around it, and the values of its constants."""

    class_name: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    latent: Sequence[int]
    constants: Mapping[str, torch.Tensor]

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of random weights."""
        import diffusers
        from safetensors.torch import save_file

        torch.manual_seed(0)
        getattr(diffusers, self.class_name)(**self.config).save_pretrained(folder)
        loop = {"inputs": self.inputs, "sampler": FLOW, "latent": {"shape": list(self.latent)}}
        (folder / "loop.yaml").write_text(yaml.safe_dump(loop))
        if self.constants:
            save_file(dict(self.constants), folder / "inputs.safetensors")
        return folder


def _image_ids() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


DIT = Network(
    "DiTTransformer2DModel",
    {
        "num_attention_heads": 6,
        "attention_head_dim": 64,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "sample_size": 2 * SIDE,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    },
    {"hidden_states": "state", "timestep": "timestep", "class_labels": "condition"},
    (4, 2 * SIDE, 2 * SIDE),
    {},
)
FLUX = Network(
    "FluxTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 6,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 24, 24),
    },
    {
        "hidden_states": "state",
        "timestep": "timestep",
        "encoder_hidden_states": TEXT | {"shape": [32, 64]},
        "pooled_projections": TEXT | {"shape": [32]},
        "img_ids": {"role": "constant", "shape": [SIDE * SIDE, 3], "dtype": "float32"},
        "txt_ids": {"role": "constant", "shape": [32, 3], "dtype": "float32"},
    },
    (SIDE * SIDE, 16),
    {"img_ids": _image_ids(), "txt_ids": torch.zeros(32, 3)},
)
UNET = Network(
    "UNet2DConditionModel",
    {
        "sample_size": 2 * SIDE,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
        "norm_num_groups": 32,
    },
    {"sample": "state", "timestep": "timestep", "encoder_hidden_states": TEXT | {"shape": [16, 64]}},
    (4, 2 * SIDE, 2 * SIDE),
    {},
)
NETWORKS = {"DiT": DIT, "FLUX": FLUX, "UNet": UNET}
GROUP_NORMS = "group norm"
LEFT_OUT = {
    "DiT": ("attention",),
    "FLUX": ("rotary", "attention"),
    "UNet": ("attention", GROUP_NORMS),
}
"""What each model is measured without, one at a time."""
WHOLE = "all"


@contextmanager
def _without_group_norm() -> Iterator[None]:
    """Leave group norms to the engine's own definition."""
    lowering = LOWERINGS.pop(GROUP_NORM)
    try:
        yield
    finally:
        LOWERINGS[GROUP_NORM] = lowering


def build(original: Program, left_out: str, out: Path) -> Path:
    """The bundle without one fusion, or with all of them; its quality is not measured."""
    rules = [rule for rule in FuseOptions().rules if rule != left_out]
    recipe = {"name": "fusions", "passes": [{"hoist": {}}, {"fuse": {"rules": rules}, "optional": True}]}
    with _without_group_norm() if left_out == GROUP_NORMS else nullcontext():
        return compiled(original, recipe, out, "onnxruntime")


def operators(bundle: Path) -> int:
    """Operators of an evaluation after the engine's own optimization."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the file is for this machine only
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "step.onnx")
        file = str(bundle / "stages" / "step.onnx")
        onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return len(onnx.load(options.optimized_model_filepath).graph.node)


def measure(name: str, folder: Path, repeats: int, seed: int) -> None:
    """Print the rows of one model."""
    print(f"building {name}", file=sys.stderr)
    original = load_checkpoint(NETWORKS[name].save(folder / "checkpoint")).capture()
    bundles = {left: build(original, left, folder / left.replace(" ", "-")) for left in (WHOLE, *LEFT_OUT[name])}
    print(f"measuring {name}", file=sys.stderr)
    found = bench(list(bundles.values()), quality_count=1, repeats=repeats, seed=seed).document()
    milliseconds = {entry["name"]: entry["latency_ms"]["median"] / STEPS for entry in found["rows"]}
    fused, whole = operators(bundles[WHOLE]), milliseconds[bundles[WHOLE].name]
    for left in LEFT_OUT[name]:
        count, plain = operators(bundles[left]), milliseconds[bundles[left].name]
        print(f"| {left} | {name} | {count} / {fused} | {whole:.1f} | {plain:.1f} | {plain / whole:.2f}x |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=";".join(NETWORKS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=12345)
    options = parser.parse_args()
    print("| fusion | model | operators without / with | ms with | ms without | ratio |\n|---|---|---|---|---|---|")
    for name in options.models.split(";"):
        with tempfile.TemporaryDirectory() as scratch:
            measure(name, Path(scratch), options.repeats, options.seed)


if __name__ == "__main__":
    main()
