"""Dynamic and static activations: the ranges that are found, and what ONNX Runtime makes of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from calibrated import calibrated, standard
from programs import context_of, samples_of
from quantizing import SITES, counted, quantize, sites

from stepfold.backends.onnxruntime.lower import lower
from stepfold.calibration.read import open_finished
from stepfold.ir.program import Program, reference
from stepfold.loop.errors import UsageError
from stepfold.loop.metrics import drift
from stepfold.loop.ports import BoundProgram
from stepfold.passes.base import PassResult
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize
from stepfold.runtime.packing import batch_invariant
from stepfold.runtime.workshop import workshop

# -- dynamic and static


def test_static_scales_are_calibrated_constants(static: PassResult) -> None:
    stage = static.program.step
    assert counted(stage) == {
        "stepfold.quantize_static.default": 4,
        "stepfold.qlinear.default": 6,
        "linear.default": 1,
    }
    found = sites(stage)
    for node in found.values():
        scale, zero = (stage.tensors()[str(argument.target)] for argument in node.args[1:3])  # type: ignore[union-attr]
        assert scale.shape == zero.shape == () and scale > 0 and zero.dtype == torch.uint8
    scales = {name: float(stage.tensors()[str(node.args[1].target)]) for name, node in found.items()}  # type: ignore[union-attr]
    assert len(set(scales.values())) == 4 and scales[SITES[0]] == scales[SITES[1]] == scales[SITES[2]]


def test_static_ranges_hold_over_the_real_loop(hoisted: Program) -> None:
    """The same calibration twice gives the same scales; another seed others."""
    first, second = (quantize(hoisted, activations="static").program.step.tensors() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_ranges_of_a_store_are_those_the_pass_would_find(
    tiny_program: Program, hoisted: Program, static: PassResult, tmp_path: Path
) -> None:
    """Taken of the captured program, used behind hoist: the same ten samples give the same scales."""
    calibrated(tiny_program, tmp_path / "store", samples=10)
    context = replace(context_of(hoisted, Path("unused")), calibration=open_finished(tmp_path / "store"))
    found = Quantize(QuantizeOptions(activations="static")).run(hoisted, context)
    for name, node in sites(static.program.step).items():
        own, stored = (
            float(program.step.tensors()[str(sites(program.step)[name].args[1].target)])  # type: ignore[union-attr]
            for program in (static.program, found.program)
        )
        assert stored == pytest.approx(own, rel=1e-5), node
    assert found.changed == static.changed == len(SITES)


def test_a_store_of_another_program_is_refused(hoisted: Program, tmp_path: Path) -> None:
    calibrated(standard(), tmp_path / "store", samples=4)
    context = replace(context_of(hoisted, Path("unused")), calibration=open_finished(tmp_path / "store"))
    with pytest.raises(UsageError, match="weights"):
        Quantize(QuantizeOptions(activations="static")).run(hoisted, context)


def test_only_dynamic_scales_couple_a_batch(hoisted: Program, dynamic: PassResult, static: PassResult) -> None:
    """What the manifest says as batch_invariant."""
    assert [batch_invariant(program.stages) for program in (hoisted, dynamic.program, static.program)] == [
        True,
        False,
        True,
    ]


# -- in ONNX Runtime, over whole batches: the reference has one scale for a batch


@pytest.fixture(scope="module")
def opened(dynamic: PassResult, static: PassResult) -> Iterator[dict[str, BoundProgram]]:
    with workshop("onnxruntime", {"rows": None}) as shop:
        yield {"dynamic": shop.open(dynamic.program), "static": shop.open(static.program)}


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_the_engine_equals_the_reference(
    opened: dict[str, BoundProgram], dynamic: PassResult, static: PassResult, activations: str
) -> None:
    """Up to activations that fall on another side of a rounding step, which the loop carries on."""
    program = {"dynamic": dynamic, "static": static}[activations].program
    assert drift(samples_of(program, opened[activations]), samples_of(program)) < 5e-3


def test_static_a_sample_alone_is_the_sample_in_a_batch_of_20(opened: dict[str, BoundProgram]) -> None:
    program = opened["static"]
    step = next(stage for stage in program.stages if stage.name == "step")
    generator = np.random.default_rng(0)
    values = {item.name: rows(item.shape, 20, generator) for item in step.inputs}
    values["hidden_states"][1:] *= 50  # batch mates of another range
    (alone,) = step.call({name: value[:1] for name, value in values.items()})
    (together,) = step.call(values)
    assert drift(together[:1], alone) < 1e-5


def test_dynamic_a_sample_depends_on_its_batch_mates(opened: dict[str, BoundProgram]) -> None:
    """The difference is what batch_invariant false stands for."""
    step = next(stage for stage in opened["dynamic"].stages if stage.name == "step")
    generator = np.random.default_rng(0)
    values = {item.name: rows(item.shape, 20, generator) for item in step.inputs}
    for value in values.values():
        value[1:] *= 50
    (alone,) = step.call({name: value[:1] for name, value in values.items()})
    (together,) = step.call(values)
    assert drift(together[:1], alone) > 1e-2


def rows(shape: tuple[int | None, ...], count: int, generator: np.random.Generator) -> np.ndarray:
    return generator.standard_normal([count if size is None else size for size in shape]).astype("float32")


def test_a_loop_of_one_equals_a_loop_of_20_with_static_scales(
    opened: dict[str, BoundProgram], static: PassResult
) -> None:
    """Guided, with the classes of the example; the noise of a seed begins with that of one sample."""
    many, one = (samples_of(static.program, opened["static"], count=count) for count in (20, 1))
    assert drift(many[:1], one) < 1e-4


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_census_of_the_optimized_graph(
    dynamic: PassResult, static: PassResult, tmp_path: Path, activations: str
) -> None:
    """ONNX Runtime keeps every quantized layer an integer product: no float MatMul or Gemm for it, no dequantization."""
    stage = {"dynamic": dynamic, "static": static}[activations].program.step
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(lower(stage, tmp_path)), options, providers=["CPUExecutionProvider"])
    census = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    integer = census["MatMulIntegerToFloat"] + census["DynamicQuantizeMatMul"]
    assert integer == len(SITES), census
    floats = sum(census[name] for name in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm"))
    assert floats == 1 and census["Attention"] == 1, census  # proj_out_2 alone
    assert census["DequantizeLinear"] == census["QLinearMatMul"] == census["MatMulInteger"] == 0, census
    quantizers = census["DynamicQuantizeLinear"] + census["QuantizeLinear"] + census["DynamicQuantizeMatMul"]
    assert 4 <= quantizers <= len(SITES), census


def test_the_reference_of_a_quantized_stage_runs_at_any_batch(dynamic: PassResult) -> None:
    stage = dynamic.program.step
    for count in (1, 3):
        values = {item.name: rows(item.shape, count, np.random.default_rng(0)) for item in stage.inputs}
        assert reference(stage)(values)[0].shape == (count, 1, 8, 8)
