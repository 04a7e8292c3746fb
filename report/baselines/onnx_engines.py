"""ONNX Runtime with its own tools: PyTorch's exporter, and stock dynamic quantization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...loop.errors import StepfoldError
from ...loop.ports import StageCallable
from ..work import Work

Array = np.ndarray
MODEL = "model.onnx"
LARGEST_PROTOBUF_BYTES = 2_000_000_000  # weights beyond it must lie in a file beside the model


def export(checkpoint: Path, model_work: Work, folder: Path) -> None:
    """Export the network with `torch.onnx.export`, the batch dynamic, to `model.onnx`.

    Raises:
        StepfoldError: the exporter fails.
    """
    import torch

    from .torch_engines import module_of

    module, example = module_of(checkpoint, model_work)
    batch = len(next(iter(example.values())))
    dynamic = [{0: torch.export.Dim.AUTO} if value.ndim and len(value) == batch else None for value in example.values()]
    with torch.no_grad():
        outputs = list(module(*example.values()))
    try:
        program = torch.onnx.export(
            module,
            tuple(example.values()),
            input_names=list(example),
            output_names=outputs,
            dynamic_shapes=(tuple(dynamic),),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(folder / MODEL))
    except Exception as error:  # the exporter raises what it likes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise StepfoldError(f"torch.onnx.export failed: {lines[0] if lines else type(error).__name__}") from error


def quantize(source: Path, folder: Path, reduce_range: bool = False) -> None:
    """Quantize `model.onnx` of `source` by `quantize_dynamic`: signed weights, per channel.

    `reduce_range` is the tool's own remedy for processors without VNNI: weights of 7 bits.

    The exporter's `value_info` is removed first: the quantizer transposes weights of Gemm, trips over the stale
    shapes and fails. Convolutions stay: ONNX Runtime has no kernel for signed dynamic ones on a CPU.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source / MODEL))
    del model.graph.value_info[:]
    large = model.ByteSize() > LARGEST_PROTOBUF_BYTES
    quantize_dynamic(
        model,
        folder / MODEL,
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
        use_external_data_format=large,
    )


def open_session(file: Path, threads: int) -> StageCallable:
    """Open a model with default settings, on the CPU.

    Raises:
        StepfoldError: ONNX Runtime refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a dozen error classes without a common base
        raise StepfoldError(f"ONNX Runtime cannot load the exported model: {str(error).splitlines()[0]}") from error
    names = [node.name for node in session.get_inputs()]

    def call(inputs: Mapping[str, Array]) -> list[Array]:
        outputs = session.run(None, {name: np.ascontiguousarray(inputs[name]) for name in names})
        return [np.asarray(output) for output in outputs]

    return call
