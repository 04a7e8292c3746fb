"""A norm with the scale and shift of each sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from programs import component, context_of, operators
from torch.nn import functional as F

from stepfold.backends.onnxruntime.lower import lower
from stepfold.backends.onnxruntime.session import open_session
from stepfold.ir.probe import outputs_drift, probe_outputs
from stepfold.ir.program import Program, reference
from stepfold.passes.base import PassResult
from stepfold.passes.fuse.onnxruntime import FuseOnnxRuntime, FuseOptions

D = 8
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
SCALE, SHIFT = (torch.randn(2, D, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
FUSED = "stepfold.modulated_norm.default"


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (D,), eps=1e-6)


def fuse(program: Program) -> PassResult:
    return FuseOnnxRuntime(FuseOptions(rules=("modulate",))).run(program, context_of(program, Path("unused")))


FORMS: dict[str, Callable] = {
    "as adaLN writes it": lambda x, s, t: norm(x) * (1 + s[:, None]) + t[:, None],
    "exchanged": lambda x, s, t: t[:, None] + (1 + s[:, None]) * norm(x),
    "epsilon of the default": lambda x, s, t: F.layer_norm(x, (D,)) * s[:, None] + t[:, None],
}


@pytest.mark.parametrize("form", FORMS)
def test_before_and_expected(form: str) -> None:
    before = component(FORMS[form], X, SCALE, SHIFT)
    result = fuse(before)
    found = operators(result.program.step)
    assert found.count(FUSED) == 1 and "layer_norm.default" not in found and "mul.Tensor" not in found
    assert (result.changed, result.refused) == (1, ())
    assert outputs_drift(probe_outputs(result.program), probe_outputs(before)) < 1e-6
    assert fuse(result.program).identity


def test_one_operator_of_the_engine(tmp_path: Path) -> None:
    stage = fuse(component(FORMS["as adaLN writes it"], X, SCALE, SHIFT)).program.step
    file = lower(stage, tmp_path)
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert kinds.count("LayerNormalization") == 1 and "Mul" not in kinds
    call = open_session(file, stage.inputs, stage.outputs, threads=1)
    for batch in (1, 3):
        values = {
            port.name: np.random.default_rng(batch).standard_normal([size or batch for size in port.shape])
            for port in stage.inputs
        }
        feed = {name: value.astype(np.float32) for name, value in values.items()}
        np.testing.assert_allclose(call(feed)[0], reference(stage)(feed)[0], rtol=1e-5, atol=1e-5)


NEAR: dict[str, tuple[Callable, str]] = {
    "weights": (
        lambda x, s, t: F.layer_norm(x, (D,), torch.full((D,), 2.0)) * s[:, None] + t[:, None],
        "the norm has weights of its own",
    ),
    "the norm is an output": (
        lambda x, s, t: ((normed := norm(x)) * s[:, None] + t[:, None], normed + 1),
        "another operator reads the norm, or its product with the scale",
    ),
    "a shift for each token": (
        lambda x, s, t: norm(x) * s[:, None] + x,
        "scale and shift are not one row for each sample, [B, 1, D]",
    ),
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses(case: str) -> None:
    function, reason = NEAR[case]
    result = fuse(component(function, X, SCALE, SHIFT))
    assert result.changed == 0 and [refusal.reason for refusal in result.refused] == [reason]


def test_a_norm_that_is_computed_twice_is_two_norms() -> None:
    result = fuse(component(lambda x, s, t: (norm(x) * s[:, None] + t[:, None], norm(x)), X, SCALE, SHIFT))
    assert (result.changed, result.refused) == (1, ())


def test_what_is_no_modulation_does_not_begin() -> None:
    for function in (
        lambda x, s, t: norm(x) * 2.0 + 1.0,
        lambda x, s, t: norm(x) + t[:, None],
        lambda x, s, t: x * x + x,
    ):
        result = fuse(component(function, X, SCALE, SHIFT))
        assert (result.changed, result.refused) == (0, ())
