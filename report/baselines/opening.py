"""Open a baseline in the process that runs it. Torch is loaded only by those that are PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from ...loop.plan import Plan
from ...loop.ports import StageCallable
from ..runners import Runner, along_loop, once
from ..work import Work
from .build import FILELESS, size_of, work_of


def open_baseline(row: Mapping[str, Any], threads: int) -> Runner:
    """Open one row.

    Args:
        row: engine, checkpoint, folder of the artifact, table file or None, loop and inputs as JSON.
        threads: number of threads of its engine.
    """
    model_work = work_of(row)
    denoiser, size = _denoiser(row, model_work, threads)
    if model_work.loop is None:
        return once(denoiser, size)
    table = Plan.from_arrays(load_file(row["table"]))
    return along_loop(denoiser, model_work.inputs, model_work.loop, table, size)


def _denoiser(row: Mapping[str, Any], model_work: Work, threads: int) -> tuple[StageCallable, int]:
    engine = row["engine"]
    if engine in FILELESS:
        from .torch_engines import open_module

        return open_module(Path(row["checkpoint"]), model_work, threads, compiled=engine == "compile")
    folder = Path(row["artifact"])
    if engine.startswith("onnxruntime"):
        from .onnx_engines import MODEL, open_session

        return open_session(folder / MODEL, threads), size_of(folder)
    from .openvino_engines import open_model

    return open_model(folder, threads, "bf16" if engine == "openvino-bf16" else "f32"), size_of(folder)
