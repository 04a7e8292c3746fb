"""Options of `quantize` by scheme: which it reads, which layers they fit, and scales by the timestep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import context_of, denoiser, samples_of
from pydantic import ValidationError
from torch import nn

from stepfold.ir.program import Program
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.loop.metrics import drift
from stepfold.passes.manager import Step, run_passes
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize
from stepfold.passes.quantize.schemes import mixed
from stepfold.passes.recipe import load_recipe
from stepfold.runtime.packing import batch_invariant
from stepfold.runtime.workshop import workshop

# -- scales by the timestep


class Growing(nn.Module):
    """What the layer reads grows eightfold over the loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.last(torch.tanh(self.layer(x * torch.exp2(3 - t / 250)[:, None, None]))))


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Program]:
    example = (torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 5.0))
    program = denoiser(Growing(), *example)
    context = context_of(program, tmp_path_factory.mktemp("cache"))
    steps = [Step(Quantize(QuantizeOptions(activations="static", include=("layer",))))]
    return program, run_passes(program, steps, context)


def test_a_range_that_drifts_gets_a_scale_for_each_bucket(growing: tuple[Program, Program]) -> None:
    _, quantized = growing
    scales, zeros = (quantized.tables[f"step.layer.input_{what}"] for what in ("scale", "zero"))
    assert scales.shape == zeros.shape == (4,) and zeros.dtype == np.uint8
    assert len(set(scales.tolist())) == 4 and scales.max() > 4 * scales.min()
    assert batch_invariant(quantized.stages)


def test_tables_of_scales_reach_the_engine(growing: tuple[Program, Program]) -> None:
    program, quantized = growing
    with workshop("onnxruntime") as shop:
        received = samples_of(quantized, shop.open(quantized))
    assert drift(received, samples_of(quantized)) < 1e-3
    assert drift(received, samples_of(program)) < 0.01


# -- wrong options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int8", "rank": 4}, r"option 'rank': scheme int8 does not read it"),
        (
            {"scheme": "int4", "activations": "static"},
            r"option 'activations': expected dynamic or float with scheme int4",
        ),
        ({"scheme": "int4", "smooth": 0.5}, r"option 'smooth': expected awq or null with scheme int4; received 0.5"),
        ({"smooth": "awq"}, r"option 'smooth': expected 0 to 1 or search or salience or null with scheme int8"),
        (
            {"smooth": 1.5},
            r"option 'smooth': expected 0 to 1 or search or salience or null with scheme int8; received 1.5",
        ),
        (
            {"scheme": "mixed", "time": 0.5, "bits": 6.0},
            r"option 'time': expected null where `bits` is given, because only one of them is spent; received 0.5 and 6",
        ),
        ({"scheme": "int5"}, r"option 'scheme': expected 'int8', .*received 'int5'"),
        (
            {"scheme": "svdquant", "residual": "int8", "activations": "float"},
            r"option 'activations': expected dynamic with residual int8.* Only residual int4 leaves",
        ),
        ({"scheme": "int4", "group": 3}, r"option 'group': expected greater than or equal to 16; received 3"),
    ],
)
def test_options_a_scheme_does_not_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe({"passes": [{"quantize": options}]}).steps()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scheme": "int4"}, "no block of a power of two from 16 divides its 8 inputs"),
        ({"scheme": "nvfp4"}, "its 8 inputs are no multiple of 16"),
        ({"scheme": "svdquant", "rank": 9}, "rank 9 is above the 8 it has"),
        ({"scheme": "codebook"}, "its 16 runs are fewer than the 1024 a codebook pays for"),
    ],
)
def test_layers_that_do_not_fit(growing: tuple[Program, Program], options: dict[str, Any], reason: str) -> None:
    program, _ = growing
    steps = [Step(Quantize(QuantizeOptions.model_validate(options)))]
    with pytest.raises(StepfoldError, match=f"expected to change something.*layer: {reason}"):
        run_passes(program, steps, context_of(program, Path("unused")))


def test_a_layer_that_stays_in_floats_is_not_measured(growing: tuple[Program, Program]) -> None:
    program, _ = growing
    group = object()
    assert mixed._damage(object(), program, group, None) == 0.0  # type: ignore[arg-type]


def test_an_engine_without_a_form_for_quantized_layers_gets_none(growing: tuple[Program, Program]) -> None:
    program, _ = growing
    context = replace(context_of(program, Path("unused")), engine_name="torch_tensorrt", activations=None)
    optional = Step(Quantize(QuantizeOptions(activations="auto")), optional=True)
    (record,) = run_passes(program, [optional], context).records
    assert record.outcome == "identity" and record.refused[0].reason.startswith("torch_tensorrt has no form")
    with pytest.raises(StepfoldError, match=r"changed nothing .*torch_tensorrt has no form for quantized layers"):
        run_passes(program, [replace(optional, optional=False)], context)


@pytest.mark.parametrize("option", ["group", "rank", "bits", "min_tokens", "max_drift"])
def test_numbers_have_a_range(option: str) -> None:
    for value in (10**30, float("nan"), float("inf")):
        with pytest.raises((ValidationError, UsageError)):
            QuantizeOptions.model_validate({option: value if option != "max_drift" else float("nan")})
