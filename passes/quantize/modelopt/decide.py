"""From a program to modelopt's decisions on its computing slots."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from ....calibration.stage_inputs import SAMPLES, step_inputs
from ....ir.program import Program
from ....loop.noise import SampleSet
from .floats import emit_floats
from .read import LinearDecision, read_decisions
from .run import Quantizer, quantize_onnx


def decide(
    program: Program,
    python: Path,
    quantizer: Quantizer,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> dict[str, LinearDecision]:
    """Let modelopt quantize the linear layers of the computing slots, and read what it decided.

    Args:
        program: program whose layers are still in floats; a smoothed one gives better decisions.
        python: interpreter of the environment, see `environment.find`.
        quantizer: what to do; `excluded` has names of nodes.
        seed: seed of the calibration samples.
        progress: called with (task, done, total).

    Returns:
        Decisions by the name of the linear node.

    Raises:
        UsageError: the settings contradict each other.
        StepfoldError: the stage has no ONNX form, modelopt failed, or its result is not understood.
    """
    batches = step_inputs(program, SampleSet("calibration", seed, SAMPLES), progress=progress)
    found: dict[str, LinearDecision] = {}
    for stage in program.steps:
        with tempfile.TemporaryDirectory(prefix="stepfold-modelopt-") as name:
            model, result = Path(name) / "float.onnx", Path(name) / "quantized.onnx"
            layers = emit_floats(stage, model)
            if set(layers) <= set(quantizer.excluded):
                continue
            read = [{port.name: batch[port.name] for port in stage.inputs} for batch in batches]
            quantize_onnx(model, result, read, python, quantizer, progress)
            decisions = read_decisions(result)
        found |= {layer: decisions[layer] for layer in layers if layer in decisions}
    return found
