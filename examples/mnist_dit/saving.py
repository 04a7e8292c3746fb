"""The files of a training run: a diffusers checkpoint, and beside it the state to go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from averaged import Training
from diffusers import DiTTransformer2DModel
from flow_matching import Settings, start
from safetensors.torch import save_file
from states import STATE, read_state, require_run, write, write_state

LOOP = Path(__file__).resolve().parent / "loop.yaml"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save(training: Training[DiTTransformer2DModel], settings: Settings, out: Path) -> None:
    """Write the training state, then the averaged weights in fp16 as a checkpoint; each file is replaced at once."""
    half = {name: value.half() for name, value in training.average.items()}
    config = json.dumps(dict(settings.config), indent=2, sort_keys=True) + "\n"
    write_state(training, settings, out / STATE)
    write(out / WEIGHTS, lambda path: save_file(half, path, {"format": "pt"}))
    write(out / "config.json", lambda path: path.write_text(config))
    write(out / "loop.yaml", lambda path: shutil.copyfile(LOOP, path))


def resume(settings: Settings, out: Path, device: str) -> Training[DiTTransformer2DModel]:
    """The run that `out` holds, or a new one where there is none.

    Raises:
        UsageError: the folder holds something else, a damaged state, or a run with other settings.
    """
    require_run(out)
    training = start(settings, device)
    read_state(training, settings, out / STATE, device)
    return training
