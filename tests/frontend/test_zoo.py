"""Real model classes, tiny: captured, run in PyTorch and in ONNX Runtime, at two batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from zoo import EACH, ZooModel

from stepfold.backends.onnx.emit import emit
from stepfold.frontend.calling import flatten, named_outputs, prediction
from stepfold.ir.program import Program
from stepfold.ir.verify import verify

PYTORCH_TOLERANCE = 1e-5  # relative, largest difference against largest value
ONNX_TOLERANCE = 1e-4
Captured = Callable[[ZooModel], Program]


def inputs_and_outputs(model: ZooModel, program: Program, batch: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Named inputs of the program for one batch, and what eager PyTorch answers."""
    kwargs = model.kwargs(batch, seed=batch)
    tensors, _ = flatten(kwargs)
    with torch.no_grad():
        outputs = list(named_outputs(getattr(model.build(), model.method)(**kwargs)).values())
    if program.loop is not None:
        outputs[0] = prediction(outputs[0], program.loop.latent.shape)
    return {i.name: tensors[i.name].numpy() for i in program.inputs}, [output.numpy() for output in outputs]


def assert_equal(got: list[np.ndarray], wanted: list[np.ndarray], tolerance: float) -> None:
    for value, expected in zip(got, wanted, strict=True):
        assert value.shape == expected.shape and value.dtype == expected.dtype
        np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("model", EACH)
def test_reference_equals_eager(model: ZooModel, captured: Captured) -> None:
    program = captured(model)
    verify(program)
    for batch in (2, 3):
        inputs, wanted = inputs_and_outputs(model, program, batch)
        assert_equal(program.bind().evaluate(inputs), wanted, PYTORCH_TOLERANCE)
    if (loop := model.loop()) is not None:
        assert program.step.outputs[0].shape == (None, *loop.latent.shape)
        assert [item.name for item in program.inputs if item.role == "state"] == [loop.state]


@pytest.mark.parametrize("model", EACH)
def test_onnxruntime_equals_eager(model: ZooModel, captured: Captured, tmp_path: Path) -> None:
    program = captured(model)
    emit(program.step, tmp_path / "model.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (2, 3):
        inputs, wanted = inputs_and_outputs(model, program, batch)
        assert_equal(session.run([port.name for port in program.step.outputs], inputs), wanted, ONNX_TOLERANCE)
