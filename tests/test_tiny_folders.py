"""`benchmarks/tiny`: folders of published configurations that diffusers runs, sizes that still fit each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

if TYPE_CHECKING:
    from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FILES = sorted((BENCHMARKS / "published").glob("*.json"))
ADDED = {"axes_dims_rope", "base_dim", "decoder_block_out_channels", "decoder_layers_per_block", "norm_num_groups"}


@pytest.fixture(scope="module")
def tiny() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import tiny.folders
        import tiny.sizes
    finally:
        sys.path.remove(str(BENCHMARKS))
    return tiny


@pytest.mark.parametrize("name", ["flux.1-dev", "stable-diffusion-xl-base-1.0"])
def test_diffusers_runs_a_folder(tiny: ModuleType, tmp_path: Path, name: str) -> None:
    """Text embeddings fit the denoiser, and the prompt, every gate and every level have a say."""
    checkpoint = tiny.folders.Checkpoint.read(BENCHMARKS / "published" / f"{name}.json")
    folder = tiny.folders.make(checkpoint, tmp_path / name)
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        pipeline(
            prompt, height=64, width=64, num_inference_steps=1, generator=torch.manual_seed(0), output_type="pt"
        ).images
        for prompt in ("a cat", "rain")
    ]
    assert drawn[0].shape == (1, 3, 64, 64) and bool(torch.isfinite(drawn[0]).all())
    assert not torch.equal(*drawn)
    assert json.loads((folder / "model_index.json").read_text()) == checkpoint.index


def test_a_folder_is_the_same_each_time_and_made_once(tiny: ModuleType, tmp_path: Path) -> None:
    checkpoint = tiny.folders.Checkpoint.read(BENCHMARKS / "published" / "dit-xl-2-512-style.json")
    first, again = (tiny.folders.make(checkpoint, tmp_path / name) for name in ("first", "again"))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes()
    (first / weights).write_bytes(b"")
    assert (tiny.folders.make_once(checkpoint, first) / weights).read_bytes() == b""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_only_sizes_change(tiny: ModuleType, file: Path) -> None:
    """Each configuration keeps its keys and whatever is no number; nothing was found that the folder does not have."""
    checkpoint = tiny.folders.Checkpoint.read(file)
    assert set(checkpoint.found) <= {"model_index", *checkpoint.components}
    classes = checkpoint.classes()
    assert set(checkpoint.components) <= set(classes)
    for name, config in checkpoint.components.items():
        if "Tokenizer" in classes[name][1] or classes[name][1].endswith("Scheduler"):
            continue
        small = tiny.sizes.shrunk(config, classes[name][1].removeprefix("Flax"), 100)
        assert small.keys() - config.keys() <= ADDED and config.keys() <= small.keys()
        for key, value in config.items():
            if isinstance(value, str | bool) or value is None:
                assert small[key] == value, key


def test_widths_that_were_sums_stay_sums(tiny: ModuleType) -> None:
    parts = tiny.folders.Checkpoint.read(BENCHMARKS / "published" / "stable-diffusion-xl-base-1.0.json").components
    unet = tiny.sizes.shrunk(parts["unet"], "UNet2DConditionModel")
    first, second = (tiny.sizes.shrunk(parts[name], "CLIPTextModel", 60) for name in ("text_encoder", "text_encoder_2"))
    assert (first["hidden_size"], second["hidden_size"]) == (24, 40)  # 768 / 32, 1280 / 32
    assert unet["cross_attention_dim"] == 64  # 24 + 40
    assert unet["projection_class_embeddings_input_dim"] == 88  # 40 + 6 * 8
    assert second["vocab_size"] == 60 and second["num_hidden_layers"] == 2
