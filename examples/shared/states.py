"""The files of a training run: each is replaced at once, and a state among them lets the same run go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from averaged import Model, Training
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stepfold.loop.errors import UsageError

STATE = Path("training") / "state.safetensors"  # in a folder of its own: a checkpoint's safetensors are its weights
MOMENTS = ("exp_avg", "exp_avg_sq")


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Have `fill` write a temporary sibling, and put it in the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fill(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_pipeline(pipeline: DiffusionPipeline, out: Path) -> None:
    """Write a pipeline's folder; its files are replaced one by one, when all of them are written."""
    temporary = out / f".pipeline.{os.getpid()}"
    try:
        pipeline.save_pretrained(temporary)
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            target = out / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_state(training: Training[Model], settings: Any, path: Path) -> None:
    """Write what a run needs to go on.

    Args:
        training: the run, after at least one step.
        settings: a dataclass of all that decides its weights besides data and steps.
        path: a safetensors file.
    """
    parameters = dict(training.model.named_parameters())
    optimizer = training.optimizer.state
    state = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    state |= {f"average.{name}": value for name, value in training.average.items()}
    state |= {f"{key}.{name}": optimizer[parameter][key] for name, parameter in parameters.items() for key in MOMENTS}
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    metadata = {"step": str(training.step), "settings": json.dumps(asdict(settings), sort_keys=True)}
    write(path, lambda temporary: save_file(state, temporary, metadata))


def require_run(out: Path) -> None:
    """Check that a folder is new, empty, or that of an earlier run.

    Raises:
        UsageError: it holds something else.
    """
    started = (out / STATE.parent).is_dir()
    if out.exists() and not started and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out}: expected a new folder or that of an earlier run; received one without {STATE}. "
            "Choose another --out."
        )


def read_state(training: Training[Model], settings: Any, path: Path, device: str) -> None:
    """Bring a run at step 0 to where the file has it; without the file it stays there.

    Raises:
        UsageError: the file is damaged, or of a run with other settings.
    """
    if not path.exists():
        return
    out = path.parents[1]
    try:
        with safe_open(path, "pt", device=device) as file:
            metadata = file.metadata() or {}
            _require_same(json.loads(metadata["settings"]), settings, out)
            _restore(training, file, int(metadata["step"]))
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise UsageError(
            f"{path}: expected the state of a training run; received: {error}. Remove {out} to begin anew."
        ) from None


def _require_same(received: dict[str, Any], settings: Any, out: Path) -> None:
    expected = json.loads(json.dumps(asdict(settings)))
    changed = [f"{key} {received.get(key)} -> {value}" for key, value in expected.items() if received.get(key) != value]
    if changed:
        raise UsageError(f"{out}: holds a run with other settings: {', '.join(changed)}. Choose another --out.")


def _restore(training: Training[Model], file: Any, step: int) -> None:
    training.step = step
    for name, parameter in training.model.named_parameters():
        parameter.data.copy_(file.get_tensor(f"model.{name}"))
        training.average[name].copy_(file.get_tensor(f"average.{name}"))
        moments = {key: file.get_tensor(f"{key}.{name}") for key in MOMENTS}
        training.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
