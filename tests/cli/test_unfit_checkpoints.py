"""`optimize` with checkpoints that it cannot use: one line says what is wrong with the folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import HOIST, LOOP
from folders import empty


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def rewrite(file: Path, **changes: Any) -> None:
    load, dump = (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    file.write_text(dump(load(file.read_text()) | changes))


# Checkpoints
def test_missing_folder(stepfold, out: Path, tmp_path: Path) -> None:
    result = stepfold("optimize", tmp_path / "none", "--out", out)
    assert (result.code, result.error.startswith(f"{tmp_path / 'none'}: no such checkpoint folder")) == (2, True)


def pickled(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def unknown_class(folder: Path) -> None:
    rewrite(folder / "config.json", _class_name="DiTTransformer3DModel")


def another_size(folder: Path) -> None:
    rewrite(folder / "config.json", num_layers=2)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_loop(folder: Path) -> None:
    (folder / "loop.yaml").unlink()


def learned_variance(folder: Path) -> None:
    sampler = {"scheduler": "DPMSolverMultistepScheduler", "config": {"variance_type": "learned"}, "steps": 8}
    rewrite(folder / "loop.yaml", sampler=sampler)


def unknown_scheduler(folder: Path) -> None:
    rewrite(folder / "loop.yaml", sampler={"scheduler": "EulerDiscreetScheduler", "steps": 8})


def two_states(folder: Path) -> None:
    rewrite(folder / "loop.yaml", inputs={**LOOP["inputs"], "class_labels": "state"})


DAMAGES = {
    pickled: "the weights are pickled (diffusion_pytorch_model.bin)",
    truncated: "it is damaged or truncated: its tensors have",
    without_weights: "no weights",
    unknown_class: "no model class 'DiTTransformer3DModel'; did you mean 'DiTTransformer2DModel'?",
    another_size: "the weights do not fit DiTTransformer2DModel as config.json describes it",
    without_config: "config.json: expected the JSON of a model; there is no such file",
    without_loop: "no loop.yaml",
    learned_variance: "variance_type 'learned' takes half of the denoiser output",
    unknown_scheduler: "EulerDiscreteScheduler",
    two_states: "exactly one input must have the role 'state'",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_unfit_checkpoints(stepfold, checkpoint: Path, out: Path, damage) -> None:
    damage(checkpoint)
    result = stepfold("optimize", checkpoint, "--out", out, "--recipe", HOIST)
    assert result.code == 2, result.err
    assert DAMAGES[damage] in result.error
    assert result.out == "" and empty(out.parent)
