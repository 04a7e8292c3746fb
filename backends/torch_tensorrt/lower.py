"""Lower stages with Torch-TensorRT: re-exported, converted operator by operator, kept as the raw bytes of a plan.

What Torch-TensorRT saves on its own is a pickled module; only the plan and a description of it go into a bundle.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...bundle.manifest import PortEntry
from ...ir.program import Stage
from ...loop.errors import StepfoldError
from ...loop.ports import Port
from ..export import export_again, lowered
from ..onnx.precision import at_precision
from ..ports import first_line
from ..tensorrt.cuda import gpus
from ..tensorrt.description import Batch, PlanDescription
from ..tensorrt.lower import PRECISIONS
from ..tensorrt.provider import CLASSIC, logger
from .options import TorchTensorrtOptions

MIB = 1 << 20


def prepare(stage: Stage, options: TorchTensorrtOptions) -> Stage:
    """The stage as the engine computes it, still executable in PyTorch."""
    return at_precision(stage, PRECISIONS[options.precision])


def lower(stage: Stage, folder: Path, *, options: TorchTensorrtOptions) -> Path:
    """Write the stage as `<name>.engine` into a folder, its description beside it, and return the first.

    Raises:
        StepfoldError: an operator has no form for this engine, or building fails.
    """
    exported = export_again(stage, lowered(prepare(stage, options), {}))
    plan = _convert(stage, exported, options)
    path = folder / f"{stage.name}.engine"
    path.write_bytes(plan)
    _described(stage, plan, options).write(path)
    return path


def _convert(stage: Stage, exported: torch.export.ExportedProgram, options: TorchTensorrtOptions) -> bytes:
    torch_tensorrt = importlib.import_module("torch_tensorrt")
    inputs = [_input(torch_tensorrt, port, options) for port in stage.inputs]
    try:
        return torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            on_gpu(exported),
            arg_inputs=inputs,
            require_full_compilation=True,
            workspace_size=(options.workspace_mib or 0) * MIB,
        )
    except Exception as error:  # of PyTorch, of its converters, of TensorRT
        raise StepfoldError(f"stage {stage.name}: Torch-TensorRT cannot build it: {first_line(error)}") from error


def on_gpu(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with its weights on the GPU, where Torch-TensorRT takes them from."""
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(exported, "cuda")


def _input(torch_tensorrt: Any, port: Port, options: TorchTensorrtOptions) -> Any:
    """The shapes and the type of an input."""
    dtype = getattr(torch, port.dtype)
    if None not in port.shape:
        return torch_tensorrt.Input(shape=port.shape, dtype=dtype)
    sizes = zip(("min_shape", "opt_shape", "max_shape"), _batch(options), strict=True)
    shapes = {key: tuple(batch if size is None else size for size in port.shape) for key, batch in sizes}
    return torch_tensorrt.Input(dtype=dtype, **shapes)


def _batch(options: TorchTensorrtOptions) -> tuple[int, int, int]:
    return options.min_batch, options.opt_batch, options.max_batch


def _described(stage: Stage, plan: bytes, options: TorchTensorrtOptions) -> PlanDescription:
    low, best, high = _batch(options)
    batched = any(None in port.shape for port in stage.inputs)
    found, _ = gpus()
    return PlanDescription(
        provider=CLASSIC.name,
        provider_version=CLASSIC.version or "unknown",
        capability=found[0].capability,
        precision=options.precision,
        batch=Batch(min=low, opt=best, max=high) if batched else None,
        inputs=tuple(PortEntry.of(port) for port in stage.inputs),
        outputs=tuple(PortEntry.of(port) for port in stage.outputs),
        layers=(),
        tensors=_tensors(stage, plan),
    )


def _tensors(stage: Stage, plan: bytes) -> dict[str, str]:
    """Port -> the name that the converter gave it: it keeps the order of inputs and of outputs, and not their names."""
    tensorrt = CLASSIC.load()
    engine = tensorrt.Runtime(logger(tensorrt)).deserialize_cuda_engine(plan)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    read = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
    return _paired(stage, "inputs", stage.inputs, read) | _paired(
        stage, "outputs", stage.outputs, [name for name in names if name not in read]
    )


def _paired(stage: Stage, kind: str, ports: Sequence[Port], names: Sequence[str]) -> dict[str, str]:
    if len(ports) != len(names):
        wanted = ", ".join(port.name for port in ports)
        raise StepfoldError(f"stage {stage.name}: expected a plan with the {kind} {wanted}; it has {', '.join(names)}.")
    return {port.name: name for port, name in zip(ports, names, strict=True)}
