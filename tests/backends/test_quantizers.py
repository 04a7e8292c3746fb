"""Products between quantizers that a model carries: pairs of safe codes stay, others are exact on every processor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated import needs_emulator
from programs import component, operators
from torch.nn.functional import conv2d, linear

import stepfold
from stepfold.backends.quantizers import in_floats, saturating_products
from stepfold.backends.registry import get
from stepfold.ir.program import Program, reference
from stepfold.report.emulation import without_vnni

M, N = 64, 8
SCALE = torch.full((N,), 0.5)
ZERO = torch.zeros(N, dtype=torch.int32)


def rounded(x: torch.Tensor, unsigned: bool) -> torch.Tensor:
    return torch.fake_quantize_per_tensor_affine(x, 1.0, 0, *((0, 255) if unsigned else (-128, 127)))


def by_channel(weight: torch.Tensor) -> torch.Tensor:
    return torch.fake_quantize_per_channel_affine(weight, SCALE, ZERO, 0, -128, 127)


class Product(torch.nn.Module):
    """A quantized product; rows of equal codes, half of them negated."""

    def __init__(self, code: int, kind: str = "linear", unsigned: bool = True) -> None:
        super().__init__()
        shape = (N, 4, 4, 4) if kind == "conv" else (N, M)
        weight = torch.full(shape, code / 2)
        weight[N // 2 :] *= -1
        self.weight, self.kind, self.unsigned = torch.nn.Parameter(weight), kind, unsigned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "conv":
            return conv2d(rounded(x[:, 0].unflatten(-1, (4, 4, 4)), self.unsigned), by_channel(self.weight))
        x = rounded(x, self.unsigned)
        if self.kind == "linear":
            return linear(x, by_channel(self.weight))
        if self.kind == "shared scale":
            return x @ torch.fake_quantize_per_tensor_affine(self.weight, 0.5, 0, -128, 127).transpose(0, 1)
        return x @ rounded(x, False).transpose(1, 2)


def program(code: int, kind: str = "linear", unsigned: bool = True) -> Program:
    return component(Product(code, kind, unsigned).eval(), torch.full((2, 4, M), 255.0 if unsigned else 127.0))


@pytest.mark.parametrize("kind", ["linear", "shared scale", "conv"])
@pytest.mark.parametrize(("code", "beyond"), [(64, False), (65, True)])
def test_codes_of_stored_weights_are_looked_at(kind: str, code: int, beyond: bool) -> None:
    stage = program(code, kind).step
    assert len(saturating_products(stage)) == beyond
    exact = in_floats(stage)
    assert (exact is stage) != beyond and in_floats(exact) is exact
    assert sum("fake" in name for name in operators(exact)) == (1 if beyond else 2)
    x = {stage.inputs[0].name: np.full((2, 4, M), 200, np.float32)}
    np.testing.assert_array_equal(reference(exact)(x)[0], reference(stage)(x)[0])


def test_two_values_that_are_computed_may_be_anything() -> None:
    """The second is rounded by plain arithmetic, in which no engine finds a pair."""
    stage = program(1, "attention").step
    exact = in_floats(stage)
    assert sum("fake" in name for name in operators(exact)) == 1
    x = {stage.inputs[0].name: np.random.default_rng(0).normal(0, 90, (3, 4, M)).astype(np.float32)}
    np.testing.assert_array_equal(reference(exact)(x)[0], reference(stage)(x)[0])


def test_a_product_with_one_quantizer_is_one_of_floats() -> None:
    stage = component(lambda x: linear(x, by_channel(torch.full((N, M), 63.5))), torch.ones(2, M)).step
    assert saturating_products(stage) == {} and in_floats(stage) is stage


RUN = """
import json, sys
import numpy as np
import stepfold
for path in json.loads(sys.argv[1]):
    (outputs,) = stepfold.load(path, threads=1).run(**np.load(path + ".npz"))
    np.save(path + ".npy", outputs)
"""


@needs_emulator
def test_engines_are_exact_without_vnni(tmp_path: Path) -> None:
    """The largest codes and activations on both engines; the manifest says what became of them."""
    wanted: dict[str, np.ndarray] = {}
    for engine in ("onnxruntime", "openvino"):
        if not get(engine).capability().can_run:
            continue
        for code, kind, unsigned in (
            (127, "linear", True),
            (127, "linear", False),
            (127, "conv", True),
            (64, "linear", True),
        ):
            given, out = program(code, kind, unsigned), str(tmp_path / f"{engine}-{code}-{kind}-{unsigned}")
            x = {given.step.inputs[0].name: np.full((2, 4, M), 255 if unsigned else 127, np.float32)}
            manifest = stepfold.load(stepfold.lower(given, engine, out=out)).manifest
            assert list(manifest.stages[0].exact_forms.values()) == ([] if code == 64 else ["float"])
            np.savez(out + ".npz", **x)
            (wanted[out],) = reference(given.step)(x)
    without_vnni("-c", RUN, json.dumps(list(wanted)))
    for path, values in wanted.items():
        np.testing.assert_allclose(np.load(path + ".npy"), values, rtol=1e-6, err_msg=path)
