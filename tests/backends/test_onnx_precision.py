"""Stages in half precision: what they compute, and which values have which type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensorrt_stages import block, stage_of, symmetric_int8
from zoo import DIT, FLUX, SD3, UNET, ZooModel

from stepfold.backends.onnx.precision import at_precision
from stepfold.ir.program import Stage, reference
from stepfold.loop.errors import StepfoldError
from stepfold.loop.metrics import drift

aten = torch.ops.aten
COST = {torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
"""Largest drift: a few units in the last place of the type (1e-3 and 8e-3)."""


def example(stage: Stage, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        port.name: generator.standard_normal([2 if n is None else n for n in port.shape]).astype(port.dtype)
        for port in stage.inputs
    }


def types(stage: Stage, *targets: object) -> set[torch.dtype]:
    return {node.meta["val"].dtype for node in stage.graph.graph.nodes if node.target in targets}


@pytest.mark.parametrize("dtype", COST)
def test_products_are_half_and_norms_are_not(dtype: torch.dtype) -> None:
    stage = block()
    half = at_precision(stage, dtype)
    assert (half.inputs, half.outputs) == (stage.inputs, stage.outputs)
    assert types(half, aten.linear.default, aten.scaled_dot_product_attention.default) == {dtype}
    assert types(half, aten.layer_norm.default, aten.sin.default) == {torch.float32}
    assert types(half, aten.gelu.default) == {dtype}
    error = drift(reference(half)(example(stage))[0], reference(stage)(example(stage))[0])
    assert 0 < error < COST[dtype]


def test_float32_is_the_stage_itself() -> None:
    stage = block()
    assert at_precision(stage, torch.float32) is stage


@pytest.mark.parametrize("model", [DIT, *(pytest.param(m, marks=pytest.mark.slow) for m in (SD3, FLUX, UNET))], ids=str)
@pytest.mark.parametrize("dtype", COST)
def test_models_keep_their_outputs(model: ZooModel, dtype: torch.dtype) -> None:
    program = model.program
    inputs = {name: value.numpy() for name, value in program.example.items()}
    half = at_precision(program.step, dtype)
    before, after = reference(program.step)(inputs)[0], reference(half)(inputs)[0]
    assert after.dtype == np.float32
    assert 0 < drift(after, before) < COST[dtype]


def test_integer_layers_have_scales_of_the_type() -> None:
    stage = symmetric_int8(block())
    half = at_precision(stage, torch.float16)
    assert types(half, torch.ops.stepfold.quantize_static.default) == {torch.int8}
    scales = {tensor.dtype for tensor in half.tensors().values() if tensor.dim() <= 1}
    assert scales == {torch.float16, torch.int8, torch.float32}  # the angles of the timestep are float32
    error = drift(reference(half)(example(stage))[0], reference(stage)(example(stage))[0])
    assert error < 2e-2  # a rounded activation may land on the neighbouring level


def test_a_timestep_keeps_its_digits() -> None:
    """700.5 and 701 are one number in bfloat16."""
    stage = stage_of(lambda x, t: x + torch.sin(t[:, None]), torch.zeros(2, 1), torch.zeros(2))
    half = at_precision(stage, torch.bfloat16)
    x, t = np.zeros((2, 1), np.float32), np.array([700.5, 701.0], np.float32)
    assert np.allclose(reference(half)({"x": x, "t": t})[0][:, 0], np.sin(t), atol=1e-6)


def test_weights_follow_the_other_argument() -> None:
    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.layer_norm(x + self.shift, (3,)) * self.shift

    half = at_precision(stage_of(Shifted(), torch.randn(2, 3)), torch.float16)
    assert types(half, aten.add.Tensor) == {torch.float16}
    assert types(half, aten.mul.Tensor) == {torch.float32}
    assert {tensor.dtype for tensor in half.tensors().values()} == {torch.float16, torch.float32}


def test_types_that_are_written_out_are_kept() -> None:
    half = at_precision(stage_of(lambda x: (x > 0).to(torch.float32) + x, torch.randn(2, 3)), torch.float16)
    assert types(half, aten.add.Tensor) == {torch.float32}


def test_a_weight_out_of_range_is_refused() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.weight.data[0, 0] = 7e4
    stage = stage_of(layer, torch.randn(2, 2))
    with pytest.raises(StepfoldError, match="expected values up to 65504, the range of float16; received 70000"):
        at_precision(stage, torch.float16)
    at_precision(stage, torch.bfloat16)
