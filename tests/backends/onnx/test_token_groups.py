"""Dynamic scales of token groups: the operator by its formula, the choice of the group, the rewrite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from blocks import TOKENS, block, quantized, tokens
from hypothesis import given
from hypothesis import strategies as st
from programs import operators

from stepfold.backends.onnx.token_groups import by_token_groups, dynamic_widths, group_size
from stepfold.ir.operators.group_qlinear import group_qlinear
from stepfold.ir.program import reference
from stepfold.ir.verify import verify


@given(st.integers(1, 40), st.integers(1, 48), st.booleans(), st.integers(0, 99))
def test_the_operator_is_its_formula(width: int, group: int, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, width)).astype(np.float32)
    x[0, 0] = 0
    weight, scale = rng.integers(-127, 128, (width, 4)).astype(np.int8), rng.uniform(0.1, 1, 4).astype(np.float32)
    bias = rng.standard_normal(4).astype(np.float32) if biased else None
    expected = np.zeros((2, 3, 4))
    for b, t in np.ndindex(2, 3):
        for start in range(0, width, group):
            part = x[b, t, start : start + group].astype(np.float64)
            step = np.float32(np.abs(x[b, t, start : start + group]).max() / np.float32(127)) or 1
            expected[b, t] += np.rint((part / step).astype(np.float32)) @ weight[start : start + group] * step * scale
    expected += 0 if bias is None else bias
    arguments = [torch.from_numpy(value) for value in (x, weight, scale)]
    received = group_qlinear(*arguments, None if bias is None else torch.from_numpy(bias), group)
    np.testing.assert_allclose(received.numpy(), expected, rtol=1e-4, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("widths", "group"),
    [
        ([192, 192, 768], 192),
        ([1152, 4608], 192),
        ([384, 1536], 192),
        ([64, 3072], 64),
        ([72, 96], 48),  # divides one of them, as 16 and 32 do, and is larger
        ([100], 96),  # divides none
        ([12, 64], 16),  # nothing fits a layer of 12
        ([4096], 256),
    ],
)
def test_the_group_is_large_and_ends_where_layers_end(widths: list[int], group: int) -> None:
    assert group_size(widths, 16, 256) == group


@pytest.mark.parametrize("size", [32, 128])
def test_the_rewrite(tmp_path: Path, size: int) -> None:
    stage = quantized(block(), "dynamic", tmp_path)
    assert dynamic_widths(stage) == [32] * 5 + [128]
    grouped = by_token_groups(stage, size)
    verify(block().with_stage(grouped))
    names = [name.removeprefix("stepfold.") for name in operators(grouped)]
    assert names.count("group_qlinear.default") == 6
    assert not {"quantize_dynamic.default", "qlinear.default"} & set(names)
    assert "qlinear.default" in str(operators(stage)), "the stage is as it was"
    values = {stage.inputs[0].name: tokens(2)}
    (received,), (exact,) = reference(grouped)(values), reference(block().step)(values)
    assert received.shape == (2, TOKENS, 32)
    assert 0 < np.abs(received - exact).max() < 0.1
    assert dynamic_widths(grouped) == []


def test_static_layers_stay(tmp_path: Path) -> None:
    stage = quantized(block(), "static", tmp_path)
    assert dynamic_widths(stage) == []
    assert operators(by_token_groups(stage, 32)) == operators(stage)
