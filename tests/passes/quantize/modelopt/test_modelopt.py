"""modelopt itself, where its environment exists: on a small component, and int8 on the reference checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import Program, component, context_of

from stepfold.backends.onnxruntime.lower import lower
from stepfold.backends.onnxruntime.session import open_session
from stepfold.calibration.conditions import sample_request
from stepfold.calibration.stage_inputs import SAMPLES, step_inputs
from stepfold.ir.program import attribute, reference
from stepfold.loop.driver import run_loop
from stepfold.loop.errors import UsageError
from stepfold.loop.metrics import drift
from stepfold.loop.noise import SampleSet
from stepfold.loop.plan import fold
from stepfold.loop.ports import BoundProgram
from stepfold.passes.hoist.hoist import Hoist, HoistOptions
from stepfold.passes.quantize.modelopt.decide import decide
from stepfold.passes.quantize.modelopt.environment import find
from stepfold.passes.quantize.modelopt.floats import emit_floats
from stepfold.passes.quantize.modelopt.read import read_decisions
from stepfold.passes.quantize.modelopt.realize import realize
from stepfold.passes.quantize.modelopt.run import Mode, Quantizer, quantize_onnx
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize

pytestmark = pytest.mark.slow
USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepfold"
LINEAR = torch.ops.aten.linear.default
WITHIN = 0.02  # of our int8: the gate


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return find(USER_CACHE)
    except UsageError as error:
        pytest.skip(str(error))


class FeedForward(torch.nn.Module):
    """Two layers, wide enough for groups of 128."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(128, 256)
        self.down = torch.nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize(
    ("mode", "dtype", "error"), [("int8", "int8", 0.01), ("fp8", "float8_e4m3fn", 0.04), ("int4", "int4", 0.15)]
)
def test_decisions_of_every_mode(python: Path, mode: Mode, dtype: str, error: float) -> None:
    """Both layers are decided, and the codes stand for the weights to within what the format allows."""
    program = component(FeedForward(), torch.randn(2, 16, 128))
    decisions = decide(program, python, Quantizer(mode))
    layers = {node.name: node for node in program.step.graph.graph.nodes if node.target is LINEAR}
    assert list(decisions) == list(layers)
    for name, decision in decisions.items():
        weight = attribute(program.step.graph, str(layers[name].args[1].target)).numpy().T  # type: ignore[union-attr]
        assert decision.weight.dtype == dtype and (decision.input is None) == (mode == "int4")
        assert decision.weight.group == (128 if mode == "int4" else None)
        assert drift(decision.weight.dequantized(), weight) < error


def bound_with(program: Program, file: Path) -> BoundProgram:
    """The program with its step stage run by ONNX Runtime from a file."""
    step = program.step
    call = open_session(file, step.inputs, step.outputs, threads=1)
    return program.bound_by(lambda stage: call if stage is step else reference(stage))


@pytest.fixture(scope="module")
def hoisted(reference_program: Program) -> Program:
    return Hoist(HoistOptions()).run(reference_program, context_of(reference_program, Path())).program


def static(program: Program, smooth: float | None) -> Program:
    """Our own static int8."""
    options = QuantizeOptions(activations="static", smooth=smooth)
    return Quantize(options).run(program, context_of(program, Path())).program


def last_layer(program: Program) -> str:
    """The layer that our int8 leaves alone."""
    return [node.name for node in program.step.graph.graph.nodes if node.target is LINEAR][-1]


def test_int8_of_the_reference_checkpoint(python: Path, hoisted: Program, tmp_path: Path) -> None:
    """Over the full loop on held-out seeds: within 2 % of our int8, and the same in our operators as in Q/DQ form."""
    model, result = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    emit_floats(hoisted.step, model)
    batches = step_inputs(hoisted, SampleSet("calibration", 0, SAMPLES))
    quantize_onnx(model, result, batches, python, Quantizer("int8", excluded=(last_layer(hoisted),)))
    decisions = read_decisions(result)
    assert len(decisions) == 48

    realized = hoisted.with_stage(realize(hoisted.step, decisions))
    floats, theirs = bound_with(hoisted, model), bound_with(hoisted, result)
    ours = bound_with(realized, lower(realized.step, tmp_path))
    held_out = step_inputs(hoisted, SampleSet("held-out", 0, 2), evaluations=10)
    exact, wanted, received = (
        np.stack([bound.stages[-1].call(batch)[0] for batch in held_out]) for bound in (floats, theirs, ours)
    )
    assert drift(received, wanted) < drift(wanted, exact) / 4  # sums in another order tip a code here and there

    program = static(hoisted, 0.7)
    assert hoisted.loop is not None and hoisted.recurrence is not None
    request, table = sample_request(hoisted, SampleSet("held-out", 0, 5)), fold(hoisted.recurrence, 2.0)
    samples = {
        name: run_loop(bound, hoisted.loop, request, table)
        for name, bound in {
            "float": floats,
            "modelopt": theirs,
            "ours": bound_with(program, lower(program.step, tmp_path)),
        }.items()
    }
    figures = {name: drift(value, samples["float"]) for name, value in samples.items()}
    assert drift(samples["modelopt"], samples["ours"]) < WITHIN
    assert abs(figures["modelopt"] - figures["ours"]) < WITHIN
    assert 0 < figures["modelopt"] < WITHIN
