"""OpenVINO in float32 and bfloat16, and NNCF post-training quantization."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...loop.errors import StepfoldError
from ...loop.noise import noise
from ...loop.plan import Plan
from ...loop.ports import StageCallable
from .. import work
from ..runners import along_loop
from ..work import Work
from .onnx_engines import MODEL as ONNX_MODEL

Array = np.ndarray
MODEL = "model.xml"
CALIBRATION_STATES = 50  # inputs of the denoiser that NNCF sees
CALIBRATION_SAMPLES = 10  # in each; four, which leave most classes out, cost 12 dB on the digits of the example
CALIBRATION_SEED = [0, 50]  # a seed sequence, which no integer seed of a bench draws
OnProgress = Callable[[int, int], None]


def without_telemetry() -> None:
    """Let OpenVINO's converter and NNCF find no `openvino_telemetry`, which has no switch of its own.

    Without it they report to nobody. Baselines are built in processes of their own, so no other code misses it.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def convert(source: Path, folder: Path) -> None:
    """Convert the exported ONNX model, weights kept in float32."""
    without_telemetry()
    import openvino

    openvino.save_model(openvino.convert_model(source / ONNX_MODEL), folder / MODEL, compress_to_fp16=False)


def quantize(source: Path, folder: Path, model_work: Work, table: Plan | None, threads: int, on: OnProgress) -> None:
    """Quantize by `nncf.quantize`, calibrated on states of the loop's own trajectory.

    Args:
        source: folder of the converted model.
        folder: where the quantized one goes.
        model_work: how the denoiser is called.
        table: the full loop.
        threads: number of threads of the engine that runs the calibration.
        on: called with (states recorded, states wanted).
    """
    without_telemetry()
    import nncf
    import openvino

    if model_work.loop is None or table is None:
        raise StepfoldError("openvino-int8 is calibrated on states of a loop; a component has none.")
    states = loop_states(open_model(source, threads, "f32"), model_work, table, on)
    model = openvino.Core().read_model(source / MODEL)
    quantized = nncf.quantize(
        model, nncf.Dataset(states), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(states)
    )
    openvino.save_model(quantized, folder / MODEL, compress_to_fp16=False)


def loop_states(denoiser: StageCallable, model_work: Work, table: Plan, on: OnProgress) -> list[dict[str, Array]]:
    """Inputs of the denoiser along the full loop: 50 calls, evenly spread over one run of a few samples."""
    loop = model_work.loop
    assert loop is not None
    recorded: list[dict[str, Array]] = []

    def record(inputs: Mapping[str, Array]) -> Any:
        recorded.append({name: np.array(value) for name, value in inputs.items()})
        on(min(len(recorded), CALIBRATION_STATES), CALIBRATION_STATES)
        return denoiser(inputs)

    runner = along_loop(record, model_work.inputs, loop, table, 0)
    runs = -(-CALIBRATION_STATES // table.evaluations)
    for run in range(runs):
        request = model_work.arrays(CALIBRATION_SAMPLES, 0)
        request[work.NOISE] = noise([*CALIBRATION_SEED, run], (CALIBRATION_SAMPLES, *loop.noise_shape))
        runner.sample(request)
    picks = np.linspace(0, len(recorded) - 1, CALIBRATION_STATES).round().astype(int)
    return [recorded[i] for i in picks]


def open_model(folder: Path, threads: int, precision: str) -> StageCallable:
    """Open a converted model for the batch size it is called with.

    The batch of a bench does not change, and OpenVINO is faster when it knows the shapes, so a model is compiled for
    each batch size at its first call.

    Args:
        folder: folder of the model.
        threads: number of threads of inference.
        precision: inference hint, `f32` or `bf16`.
    """
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def call(inputs: Mapping[str, Array]) -> list[Array]:
        shapes = tuple(value.shape for value in inputs.values())
        if shapes not in requests:
            model = core.read_model(folder / MODEL)
            model.reshape({name: list(value.shape) for name, value in inputs.items()})
            requests[shapes] = core.compile_model(model, "CPU", settings).create_infer_request()
        result = requests[shapes].infer(dict(inputs))
        return [np.array(value) for value in result.values()]

    return call
