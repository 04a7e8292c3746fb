"""Compiled stages that compute something else than their graphs are found before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import zoo
from torch import nn

import stepfold
from stepfold.backends.onnxruntime import lower as onnxruntime_lower
from stepfold.backends.registry import get
from stepfold.frontend.capture import capture
from stepfold.ir.program import Program
from stepfold.loop.errors import StepfoldError
from stepfold.runtime.workshop import workshop
from stepfold.runtime.wrong_stages import difference, tolerance

ATEN = torch.ops.aten


class Network(nn.Module):
    """Two layers with an activation between them, and a sum of their features behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.second(torch.tanh(self.first(x))).exp()}


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Network(), {"x": torch.randn(3, 8)})


def plant(patch: pytest.MonkeyPatch, target: Any, wrong: Callable[..., Any]) -> None:
    """Let ONNX Runtime get an operator wrong."""
    patch.setitem(onnxruntime_lower.LOWERINGS, target, wrong)


def test_a_right_engine_is_opened(program: Program) -> None:
    with workshop("onnxruntime") as shop:
        bound = shop.open(program)
        np.testing.assert_allclose(
            bound.evaluate({"x": program.example["x"].numpy()})[0],
            program.bind().evaluate({"x": program.example["x"].numpy()})[0],
            rtol=1e-5,
        )


def test_a_wrong_operator_is_named_with_the_smallest_part(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, ATEN.tanh.default, lambda x: x * 0.9)
    with workshop("onnxruntime") as shop, pytest.raises(StepfoldError) as caught:
        shop.open(program)
    text = str(caught.value)
    assert text.startswith("stage forward: expected onnxruntime to compute what the graph says, on the example inputs;")
    assert "output 'y' differs by" in text and "aten.tanh.default. The smallest part that fails has 1 operators" in text
    file = text.rpartition(": ")[2]
    model = onnx.load(file)
    assert [node.op_type for node in model.graph.node] == ["Mul"]
    onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_numbers_that_are_not_finite_are_named(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, ATEN.exp.default, lambda x: (x - x) / (x - x))
    with workshop("onnxruntime") as shop, pytest.raises(StepfoldError, match="24 of 24 numbers that are not finite"):
        shop.open(program)


def test_nothing_is_left_of_a_wrong_bundle(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, ATEN.tanh.default, lambda x: x * 0.9)
    with pytest.raises(StepfoldError, match=re.escape("aten.tanh.default")):
        stepfold.lower(program, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_is_not_finite_itself_is_refused(program: Program) -> None:
    example = {"x": torch.full((3, 8), torch.nan)}
    with workshop("onnxruntime") as shop, pytest.raises(StepfoldError, match="output 'y': expected finite numbers"):
        shop.open(replace(program, example=example))


def test_a_stage_is_compared_once(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("stepfold.runtime.wrong_stages.difference", lambda *words: seen.append(words))
    with workshop("onnxruntime") as shop:
        shop.open(program)
        shop.open(replace(program, records=()))
    assert len(seen) == 1


def test_infinities_of_a_mask_are_no_error() -> None:
    mask = np.array([0.0, -np.inf, 1.0])
    assert difference({"m": np.array([0.0, np.finfo(np.float32).min, 1.0])}, {"m": mask}, 1e-3) is None
    assert difference({"m": np.array([np.nan, -np.inf, 1.0])}, {"m": mask}, 1e-3) is not None


def test_shapes_and_sizes_of_a_difference() -> None:
    wanted = {"y": np.ones(4)}
    assert difference({"y": np.ones(3)}, wanted, 1e-3) == "output 'y' has the shape [3] in the place of [4]"
    assert difference({"y": np.full(4, 1.0005)}, wanted, 1e-3) is None
    assert "differs by 0.002 of its size" in str(difference({"y": np.full(4, 1.002)}, wanted, 1e-3))
    assert "differs by inf of its size" in str(difference({"y": np.ones(4)}, {"y": np.zeros(4)}, 1e-3))


def test_the_tolerance_is_that_of_the_lowest_precision(program: Program) -> None:
    engine = get("onnxruntime")
    assert tolerance(program.stages[0], engine) == 1e-3
    assert tolerance(program.stages[0], get("tensorrt")) == 2e-2, "TF32"
    assert tolerance(capture(Network().half(), {"x": torch.randn(2, 8).half()}).stages[0], engine) == 2e-2
    assert tolerance(capture(Network().bfloat16(), {"x": torch.randn(2, 8).bfloat16()}).stages[0], engine) == 1e-1


class SmallConstants(nn.Module):
    """Sums, products and quotients with numbers that are nearly 0 and 1."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        near_zero, near_one = self.number, 1.0 + 100 * self.number
        return {
            "sum": x / (x.abs() + near_zero),
            "other_sum": x / (near_zero + x.abs()),
            "difference": x / (x.abs() - near_zero),
            "product": (x * near_one - x) / near_zero,
            "quotient": (x / near_one - x) / near_zero,
            "norm": x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + near_zero),
            "unchanged": (x + 0.0) * 1.0 / 1.0 - 0.0,
        }


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("number", [1e-8, 1e-15])
def test_small_constants_are_kept(backend: str, number: float) -> None:
    """Rows of zeros and of tiny numbers, where they decide."""
    pytest.importorskip(backend)
    x = torch.randn(4, 8)
    x[1], x[2] = 0.0, x[2] * number
    program = capture(SmallConstants(number), {"x": x})
    with workshop(backend) as shop:
        received = shop.open(program).evaluate({"x": x.numpy()})
    for got, wanted in zip(received, program.bind().evaluate({"x": x.numpy()}), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-30)


def test_operators_that_change_nothing_are_dropped(tmp_path: Path) -> None:
    program = capture(SmallConstants(1e-3), {"x": torch.randn(2, 8)})
    path = stepfold.lower(program, out=tmp_path / "out")
    model = onnx.load(path / "stages" / "forward.onnx")
    producer = {name: node for node in model.graph.node for name in node.output}
    assert producer["unchanged"].op_type == "Identity" and producer["unchanged"].input[0] == "x"


LINEAR_ATTENTION: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "stride_conv",
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_sana(backend: str) -> None:
    """Its network and the decoder that it was trained with: attention without a softmax, over sums that may be zero."""
    pytest.importorskip(backend)
    import diffusers

    torch.manual_seed(0)
    decoder = diffusers.AutoencoderDC(**LINEAR_ATTENTION).eval()
    latents = torch.randn(2, 4, 8, 8)
    program = capture(decoder, {"z": latents, "return_dict": False}, method="decode")
    with workshop(backend) as shop:
        (image,) = shop.open(program).evaluate({"z": latents.numpy()})
        with torch.no_grad():
            wanted = decoder.decode(latents, return_dict=False)[0]
        np.testing.assert_allclose(image, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        shop.open(zoo.SANA.program)  # is compared with its graph
