"""What the `quantize` pass makes, as plans: the requested precision is that of the network's layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import component, context_of
from stages import floats, one_call
from tensorrt_stages import SM89, Block, needs_rtx

from stepfold.backends.tensorrt.description import PlanDescription
from stepfold.backends.tensorrt.lower import lower
from stepfold.backends.tensorrt.options import TensorrtOptions
from stepfold.loop.errors import StepfoldError
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize

pytestmark = needs_rtx


class Head(torch.nn.Module):
    """The block, and something behind its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor, shift: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.block(x, shift, t))


def plan_of(folder: Path, options: TensorrtOptions = SM89, **scheme: Any) -> PlanDescription:
    generator = torch.Generator().manual_seed(1)
    x, shift = torch.randn(2, 8, 32, generator=generator), torch.randn(2, 32, generator=generator)
    program = component(Head(), x, shift, torch.tensor([700.5, 33.0]))
    operation = Quantize(QuantizeOptions.model_validate(scheme))
    quantized = operation.run(program, context_of(program, folder / "cache")).program
    return PlanDescription.read(lower(quantized.step, folder, options))


def types(plan: PlanDescription, kind: str) -> Counter[str]:
    return Counter(name for layer in plan.layers if layer.kind == kind for name in layer.types)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("scheme", "element"),
    [
        ({"scheme": "fp8"}, "fp8"),
        ({"scheme": "int8", "activations": "symmetric"}, "int8"),
        ({"scheme": "svdquant", "residual": "fp8", "rank": 4}, "fp8"),
    ],
)
def test_products_read_what_was_asked_for(tmp_path: Path, scheme: dict[str, Any], element: str, precision: str) -> None:
    plan = plan_of(tmp_path, TensorrtOptions(capability="SM89", precision=precision), **scheme)  # type: ignore[arg-type]
    assert sum(count for name, count in types(plan, "QUANTIZE").items() if name.startswith(element)) == 4
    assert sum(types(plan, "DEQUANTIZE").values()) == 8


def test_scales_of_run_time_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StepfoldError, match=r"quantize\.activations=dynamic"):
        plan_of(tmp_path, scheme="int8")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_fp4_on_blackwell(tmp_path: Path, precision: str) -> None:
    """Codes of weights are stored in 4 bits, those of activations taken at run time, both twice dequantized."""
    plan = plan_of(tmp_path, TensorrtOptions(capability="SM120", precision=precision), scheme="nvfp4")  # type: ignore[arg-type]
    assert types(plan, "DYNAMIC_QUANTIZE") == {"fp4": 4, "fp8": 4}
    assert types(plan, "CONSTANT")["fp4"] == types(plan, "CONSTANT")["fp8"] == 4
    assert sum(types(plan, "DEQUANTIZE").values()) == 16


def test_fp4_on_older_gpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepfoldError, match=r"FP4 products, SM120 or SM121; received SM89\. Name another"):
        plan_of(tmp_path, scheme="nvfp4")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "product"), [("fp32", "float32"), ("fp16", "float16")])
@pytest.mark.parametrize(
    ("scheme", "element"),
    [
        ({"scheme": "int4"}, "int4"),
        ({"scheme": "int8-weights"}, "int8"),
        ({"scheme": "svdquant", "rank": 4}, "int4"),
    ],
)
def test_weights_in_blocks(tmp_path: Path, scheme: dict[str, Any], element: str, precision: str, product: str) -> None:
    """Four layers: their weights are stored in few bits, and products are of floats."""
    options = TensorrtOptions(capability="SM89", precision=precision)  # type: ignore[arg-type]
    plan = plan_of(tmp_path, options, **scheme, activations="float")
    assert types(plan, "CONSTANT")[element] == 4 and types(plan, "DEQUANTIZE") == {product: 4}
    assert not types(plan, "QUANTIZE") and set(types(plan, "MATRIX_MULTIPLY")) == {product}


@pytest.mark.parametrize("scheme", [{"scheme": "int4"}, {"scheme": "svdquant", "rank": 4}])
def test_weights_in_blocks_with_rounded_activations_are_refused(tmp_path: Path, scheme: dict[str, Any]) -> None:
    with pytest.raises(
        StepfoldError, match=r"run time \(quantize\.activations=dynamic\)\. .*activations=float, or the recipe"
    ):
        plan_of(tmp_path, **scheme)


@pytest.mark.parametrize(
    ("shape", "zeros", "settings", "received"),
    [
        ((5, 2, 4), None, (2, 16, False), "weights of 2 bits"),
        ((5, 2, 8), (5, 1), (4, 16, False), "zero points of weights"),
        ((5, 3, 8), None, (4, 16, False), "blocks of 16 for 40 features"),
    ],
)
def test_blocks_without_a_form(
    tmp_path: Path, shape: tuple[int, ...], zeros: tuple[int, ...] | None, settings: tuple, received: str
) -> None:
    inputs = [floats(None, 3, 32 if shape[1] == 2 else 40)]
    zero_points = None if zeros is None else torch.zeros(zeros, dtype=torch.uint8)
    weights = [torch.zeros(shape, dtype=torch.uint8), torch.ones(shape[:2]), zero_points, None]
    stage = one_call(torch.ops.stepfold.blocked_linear.default, inputs, weights, settings)
    with pytest.raises(StepfoldError, match=f"in whole blocks and float activations.*received {received}"):
        lower(stage, tmp_path, SM89)
