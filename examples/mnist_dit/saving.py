"""The files of a training run: a diffusers checkpoint, and beside it the state to go on from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from flow_matching import Settings, Training, start
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stepfold.loop.errors import UsageError

LOOP = Path(__file__).resolve().parent / "loop.yaml"
WEIGHTS = "diffusion_pytorch_model.safetensors"
STATE = Path("training") / "state.safetensors"  # in a folder of its own: a checkpoint's safetensors are its weights
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(training: Training, settings: Settings, out: Path) -> None:
    """Write the training state, then the averaged weights in fp16 as a checkpoint; each file is replaced at once."""
    parameters = dict(training.model.named_parameters())
    optimizer = training.optimizer.state
    state = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    state |= {f"average.{name}": value for name, value in training.average.items()}
    state |= {f"{key}.{name}": optimizer[parameter][key] for name, parameter in parameters.items() for key in MOMENTS}
    metadata = {"step": str(training.step), "settings": json.dumps(asdict(settings), sort_keys=True)}
    half = {name: value.half() for name, value in training.average.items()}
    config = json.dumps(dict(settings.config), indent=2, sort_keys=True) + "\n"
    write(out / STATE, lambda path: save_file(state, path, metadata))
    write(out / WEIGHTS, lambda path: save_file(half, path, {"format": "pt"}))
    write(out / "config.json", lambda path: path.write_text(config))
    write(out / "loop.yaml", lambda path: shutil.copyfile(LOOP, path))


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Have `fill` write a temporary sibling, and put it in the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fill(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def resume(settings: Settings, out: Path, device: str) -> Training:
    """The run that `out` holds, or a new one where there is none.

    Raises:
        UsageError: the folder holds something else, a damaged state, or a run with other settings.
    """
    path = out / STATE
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(
                f"{out}: expected a new folder or that of an earlier run; received one without {STATE}. "
                "Choose another --out."
            )
        return start(settings, device)
    try:
        with safe_open(path, "pt", device=device) as file:
            metadata = file.metadata() or {}
            _require_same(json.loads(metadata["settings"]), settings, out)
            return _restored(settings, file, int(metadata["step"]), device)
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise UsageError(
            f"{path}: expected the state of a training run; received: {error}. Remove {out} to begin anew."
        ) from None


def _require_same(received: dict[str, Any], settings: Settings, out: Path) -> None:
    expected = json.loads(json.dumps(asdict(settings)))
    changed = [f"{key} {received.get(key)} -> {value}" for key, value in expected.items() if received.get(key) != value]
    if changed:
        raise UsageError(f"{out}: holds a run with other settings: {', '.join(changed)}. Choose another --out.")


def _restored(settings: Settings, file: Any, step: int, device: str) -> Training:
    training = start(settings, device)
    training.step = step
    for name, parameter in training.model.named_parameters():
        parameter.data.copy_(file.get_tensor(f"model.{name}"))
        training.average[name].copy_(file.get_tensor(f"average.{name}"))
        moments = {key: file.get_tensor(f"{key}.{name}") for key in MOMENTS}
        training.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return training
