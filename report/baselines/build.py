"""Build the model file of a baseline: exported, converted or quantized once, shared by its `@STEPS` variants."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...bundle.manifest import InputEntry
from ...loop.pipeline_call import PipelineCall
from ...loop.spec import LoopSpec
from ...loop.writing import temporary_sibling
from ..work import Work

logger = logging.getLogger(__name__)

# What each artifact is made from; PyTorch rows run the checkpoint itself.
SOURCES: dict[str, str | None] = {
    "eager": None,
    "compile": None,
    "onnxruntime": None,
    "onnxruntime-int8": "onnxruntime",
    "onnxruntime-int8-reduced": "onnxruntime",
    "openvino": "onnxruntime",
    "openvino-int8": "openvino",
}
FILELESS = ("eager", "compile")


def chain(artifact: str) -> list[str]:
    """The artifacts to build for one of them, in order, itself last."""
    source = SOURCES[artifact]
    return [*(chain(source) if source else []), *([] if artifact in FILELESS else [artifact])]


def build(message: Mapping[str, Any], on_progress: Callable[[int, int], None]) -> int:
    """Build one artifact into its folder, unless it is there; an interrupted build leaves nothing.

    Args:
        message: artifact, checkpoint, folder of all artifacts, threads, loop and inputs as JSON, `example` (a request
            file) and `table` of the full loop.
        on_progress: called with (done, total) during calibration.

    Returns:
        Bytes of what was built.
    """
    folder, artifact = Path(message["folder"]), message["artifact"]
    target = folder / artifact
    if not target.is_dir():
        partial = temporary_sibling(target)
        partial.mkdir(parents=True)
        try:
            _build(artifact, folder, partial, message, on_progress)
            os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return size_of(target)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def work_of(message: Mapping[str, Any]) -> Work:
    """The work that `describe` wrote into a message."""
    from .. import work

    loop = message["loop"]
    inputs = tuple(InputEntry.model_validate(entry).input_port() for entry in message["inputs"])
    example = work.read_all(Path(message["example"])) if message.get("example") else {}
    call = None if message["call"] is None else PipelineCall.model_validate(message["call"])
    return Work(None if loop is None else LoopSpec.model_validate(loop), inputs, example, call=call)


def describe(model_work: Work) -> dict[str, Any]:
    """Loop, inputs and call of a work as JSON."""
    return {
        "call": None if model_work.call is None else model_work.call.model_dump(mode="json"),
        "loop": None if model_work.loop is None else model_work.loop.model_dump(mode="json"),
        "inputs": [InputEntry.of_input(port).model_dump(mode="json") for port in model_work.inputs],
    }


def _build(
    artifact: str, folder: Path, target: Path, message: Mapping[str, Any], on_progress: Callable[[int, int], None]
) -> None:
    model_work = work_of(message)
    logger.info("building %s", artifact)
    if artifact == "onnxruntime":
        from .onnx_engines import export

        export(Path(message["checkpoint"]), model_work, target)
    elif artifact.startswith("onnxruntime-int8"):
        from . import onnx_engines

        reduced = artifact == "onnxruntime-int8-reduced"
        onnx_engines.quantize(folder / "onnxruntime", target, reduce_range=reduced)
    elif artifact == "openvino":
        from .openvino_engines import convert

        convert(folder / "onnxruntime", target)
    else:
        from . import openvino_engines
        from .prepare import read_table

        table = read_table(message["table"]) if message["table"] is not None else None
        openvino_engines.quantize(folder / "openvino", target, model_work, table, message["threads"], on_progress)
