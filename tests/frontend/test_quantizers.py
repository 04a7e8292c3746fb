"""Quantizers of a captured model: PyTorch's own operators, and modelopt's modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from programs import operators

import stepfold
from stepfold.backends.onnxruntime.lower import lower
from stepfold.backends.onnxruntime.session import open_session
from stepfold.frontend.quantizers import plain_quantizers
from stepfold.ir.program import Program
from stepfold.loop.errors import StepfoldError

TENSOR = "fake_quantize_per_tensor_affine.default"
PARAMETERS = "fake_quantize_per_tensor_affine.tensor_qparams"
CHANNEL = "fake_quantize_per_channel_affine.default"
X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


class Quantized(torch.nn.Module):
    """Two layers whose inputs and first weight are quantized by PyTorch's own operators."""

    weight_scale: torch.Tensor
    weight_zero: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.register_buffer("weight_scale", self.up.weight.detach().abs().amax(1) / 64)  # no pair saturates
        self.register_buffer("weight_zero", torch.zeros(16, dtype=torch.int32))
        self.register_buffer("scale", torch.tensor(0.03))
        self.register_buffer("zero", torch.tensor(7, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, 0.02, 3, 0, 255)
        weight = torch.fake_quantize_per_channel_affine(
            self.up.weight, self.weight_scale, self.weight_zero, 0, -128, 127
        )
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, self.up.bias))
        return self.down(torch.fake_quantize_per_tensor_affine(hidden, self.scale, self.zero, -128, 127))


def run_in_onnxruntime(program: Program, folder: Path, x: torch.Tensor) -> tuple[np.ndarray, list[str]]:
    """The output of the lowered stage, and the operators of its file."""
    path = lower(program.step, folder)
    (received,) = open_session(path, program.step.inputs, program.step.outputs, threads=1)({"x": x.numpy()})
    return received, [node.op_type for node in onnx.load(str(path)).graph.node]


def test_fake_quantization_is_kept(tmp_path: Path) -> None:
    """As nodes in the graph, the quantized weight too, and as Q/DQ pairs in the file; outputs are equal."""
    model = Quantized().eval()
    program = stepfold.capture(model, {"x": X})
    found = operators(program.step)
    assert [name for name in found if "fake" in name] == [TENSOR, CHANNEL, PARAMETERS]
    with torch.no_grad():
        wanted = model(X)
        torch.testing.assert_close(program.step.graph(X)[0], wanted, rtol=0, atol=0)
    received, kinds = run_in_onnxruntime(program, tmp_path, X)
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 3
    np.testing.assert_allclose(received, wanted.numpy(), atol=1e-5)


def test_another_batch(tmp_path: Path) -> None:
    program = stepfold.capture(Quantized().eval(), {"x": X})
    more = torch.cat([X, X * 3])
    with torch.no_grad():
        wanted = Quantized()(more)
    received, _ = run_in_onnxruntime(program, tmp_path, more)
    np.testing.assert_allclose(received, wanted.numpy(), atol=1e-5)


class TensorQuantizer(torch.nn.Module):
    """What modelopt's quantizer of this name shows of itself; its own rounding is refused by torch.export."""

    amax: torch.Tensor
    is_enabled: bool
    unsigned: bool

    def __init__(self, amax: torch.Tensor | None, **changes: Any):
        super().__init__()
        if amax is not None:
            self.register_buffer("amax", amax)
        defaults = {"num_bits": 8, "unsigned": False, "narrow_range": False, "is_enabled": True, "fake_quant": True}
        for name, value in {**defaults, "block_sizes": None, "pre_quant_scale": None, **changes}.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_enabled:
            return x
        if self.amax.min() < 0:
            raise ValueError("negative")
        scale = (255 if self.unsigned else 127) / self.amax
        low, high = (0, 255) if self.unsigned else (-128, 127)
        return (x * scale).round().clamp(low, high) / scale


TensorQuantizer.__module__ = "modelopt.torch.quantization.nn.modules.tensor_quantizer"


class Carrier(torch.nn.Module):
    """A layer with quantizers, as `mtq.quantize` leaves it."""

    def __init__(self, given: TensorQuantizer, weight: TensorQuantizer, output: TensorQuantizer | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 16)
        self.input_quantizer, self.weight_quantizer = given, weight
        self.output_quantizer = output or TensorQuantizer(None, is_enabled=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight_quantizer(self.layer.weight)
        return self.output_quantizer(torch.nn.functional.linear(self.input_quantizer(x), weight, self.layer.bias))


def per_tensor(**changes: Any) -> TensorQuantizer:
    return TensorQuantizer(torch.tensor(2.5), **changes)


def per_channel() -> TensorQuantizer:
    return TensorQuantizer(torch.linspace(0.2, 0.5, 16)[:, None])


def test_modelopt_quantizers_become_the_operators(tmp_path: Path) -> None:
    """Per tensor, per channel and switched off; the model is as before afterwards."""
    model = Carrier(per_tensor(), per_channel()).eval()
    with torch.no_grad():
        wanted = model(X)
    program = stepfold.capture(model, {"x": X})
    assert sorted(name for name in operators(program.step) if "fake" in name) == [CHANNEL, TENSOR]
    with torch.no_grad():
        torch.testing.assert_close(program.step.graph(X)[0], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(X), wanted, rtol=0, atol=0)
    assert "forward" not in model.input_quantizer.__dict__
    received, kinds = run_in_onnxruntime(program, tmp_path, X)
    assert kinds.count("QuantizeLinear") == 1, "the codes of the weight saturate without VNNI, so it is decoded"
    np.testing.assert_allclose(received, wanted.numpy(), atol=1e-4)


def test_unsigned_and_smoothed() -> None:
    """SmoothQuant's factors are multiplied before; an unsigned output has 255 steps."""
    factors = torch.linspace(0.5, 1.5, 8)
    model = Carrier(per_tensor(pre_quant_scale=factors), per_channel(), per_tensor(unsigned=True)).eval()
    program = stepfold.capture(model, {"x": X})
    with torch.no_grad():
        weight = model.weight_quantizer(model.layer.weight)
        hidden = torch.nn.functional.linear(model.input_quantizer(X * factors), weight, model.layer.bias)
        torch.testing.assert_close(program.step.graph(X)[0], model.output_quantizer(hidden), rtol=1e-5, atol=1e-5)


def test_a_range_of_zero_gives_zeros() -> None:
    quantizer = TensorQuantizer(torch.zeros(()))
    with plain_quantizers(quantizer) as count:
        assert count == 1
        assert quantizer(torch.tensor([1e-3, -5.0])).abs().max() < 1e-7


def test_modules_of_others_are_left_alone() -> None:
    class Foreign(torch.nn.Module):
        pass

    Foreign.__name__ = "TensorQuantizer"
    with plain_quantizers(torch.nn.Sequential(torch.nn.Linear(2, 2), Foreign())) as count:
        assert count == 0


def test_quantizers_work_again_after_a_failure() -> None:
    quantizer = per_tensor()
    with pytest.raises(RuntimeError, match="stop"), plain_quantizers(quantizer):
        raise RuntimeError("stop")
    assert "forward" not in quantizer.__dict__


@pytest.mark.parametrize(
    ("quantizer", "received"),
    [
        (per_tensor(num_bits=(4, 3)), r"num_bits=\(4, 3\)"),
        (per_tensor(block_sizes={-1: 128}), "blocks"),
        (TensorQuantizer(None), "a range that is computed at run time"),
        (per_tensor(fake_quant=False), "weights that are stored as codes"),
        (per_tensor(narrow_range=True), "a narrow range"),
        (per_tensor(rotate_is_enabled=True), "a rotation"),
        (per_tensor(bias_value=torch.zeros(1)), "a bias"),
        (TensorQuantizer(torch.ones(2, 3)), "ranges along several axes"),
    ],
)
def test_other_formats_are_refused(quantizer: TensorQuantizer, received: str) -> None:
    with pytest.raises(StepfoldError, match=f"quantizer input_quantizer: expected 8-bit .*{received}.*mtq.quantize"):
        stepfold.capture(Carrier(quantizer, per_channel()), {"x": X})
