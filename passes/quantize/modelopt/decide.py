"""From a program to modelopt's decisions on its step stage."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from ....backends.onnx.emit import Lowerings
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
    lowerings: Lowerings,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> dict[str, LinearDecision]:
    """Let modelopt quantize the linear layers of the step stage, and read what it decided.

    Args:
        program: program with a float step stage; a smoothed one gives better decisions.
        python: interpreter of the environment, see `environment.find`.
        quantizer: what to do; `excluded` has names of nodes of the step stage.
        lowerings: lowerings to standard ONNX operators, see `emit_floats`.
        seed: seed of the calibration samples.
        progress: called with (task, done, total).

    Returns:
        Decisions by the name of the linear node.

    Raises:
        UsageError: the settings contradict each other.
        StepfoldError: the stage has no ONNX form, modelopt failed, or its result is not understood.
    """
    batches = step_inputs(program, SampleSet("calibration", seed, SAMPLES), progress=progress)
    with tempfile.TemporaryDirectory(prefix="stepfold-modelopt-") as name:
        model, result = Path(name) / "float.onnx", Path(name) / "quantized.onnx"
        layers = emit_floats(program.step, model, lowerings)
        quantize_onnx(model, result, batches, python, quantizer, progress)
        decisions = read_decisions(result)
    return {layer: decisions[layer] for layer in layers if layer in decisions}
