"""A tiny class-conditional DiT of random weights with a loop of eight calls, as a checkpoint folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from stepfold.ir.program import Program

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 1,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 4,
}
LOOP: dict[str, Any] = {
    "inputs": {"hidden_states": "state", "timestep": "timestep", "class_labels": "condition"},
    "sampler": {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "config": {"num_train_timesteps": 1000},
        "steps": 8,
        "set_timesteps": {"sigmas": "linspace"},
    },
    "guidance": {"scale": 2.0, "unconditional": {"class_labels": 4}},
    "latent": {"shape": [1, 8, 8]},
}
CLASSES = 4
HOIST = Path(__file__).parent / "recipes" / "hoist.yaml"  # exact, every call evaluated, nothing to search
QUICK = {"samples": 8, "search_samples": 4, "moves": 0}  # options of `schedule` that search in a second


def save_tiny_dit(folder: Path, seed: int = 0) -> Path:
    """Write config.json, safetensors and loop.yaml; another seed gives other weights."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**CONFIG)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.1)  # zero-initialized gates would leave the blocks without effect
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "loop.yaml").write_text(yaml.safe_dump(LOOP, sort_keys=False))
    return folder


def load_captured(patch: pytest.MonkeyPatch, checkpoint: Path, program: Program) -> None:
    """Do not load and capture a checkpoint again; with a loop or inputs of its own it is another one."""
    from stepfold.frontend import load

    real = load.load_checkpoint
    captured = SimpleNamespace(capture=lambda: program, capture_ends=lambda: None, run=None)

    def loaded(path: Path, **more: Any) -> Any:
        return captured if path == checkpoint and not any(more.values()) else real(path, **more)

    patch.setattr(load, "load_checkpoint", loaded)


class Remembered:
    """Loads and captures each folder once for each call; to stand in for `load_checkpoint` where tests share a folder.

    Programs never change, so what one command captured serves the next as well.
    """

    def __init__(self) -> None:
        from stepfold.frontend import load

        self._load = load.load_checkpoint
        self._kept: dict[tuple[Path, str], Any] = {}

    def __call__(self, path: Path, **more: Any) -> Any:
        asked = {name: value for name, value in more.items() if value is not None and getattr(value, "given", True)}
        key = path, repr(sorted(asked.items()))
        if key not in self._kept:
            loaded = self._load(path, **more)
            for name in ("capture", "capture_ends"):
                object.__setattr__(loaded, name, cache(getattr(loaded, name)))
            self._kept[key] = loaded
        return self._kept[key]

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """Commands load with this as long as the patch holds."""
        patch.setattr("stepfold.frontend.load.load_checkpoint", self)
