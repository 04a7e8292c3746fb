"""Hoisting: what does not depend on the latent runs at its own rate, and every number stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hoisting import EXACT, assert_same_samples, by_rate, hoist
from programs import Modulated, calls, component, context_of, denoiser, modulated, operators

from stepfold.ir.analysis.rates import node_rates, parameters_by_rate
from stepfold.ir.cost import program_flops
from stepfold.ir.program import Program, Stage
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.loop.ports import Rate
from stepfold.passes.base import PassResult
from stepfold.passes.hoist.hoist import Hoist, HoistOptions
from stepfold.passes.manager import Step, run_passes
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize


@pytest.fixture(scope="module")
def program() -> Program:
    return modulated()


@pytest.fixture(scope="module")
def hoisted(program: Program) -> Program:
    return hoist(program).program


@pytest.fixture(scope="module")
def tiny_hoisted(tiny_program: Program) -> PassResult:
    return hoist(tiny_program)


# -- structure


def test_before_and_expected(program: Program, hoisted: Program) -> None:
    """y = body(x) gain(c, t) + shift(t): the step keeps its own linear, a product and a sum."""
    assert by_rate(program) == {
        Rate.STEP: [
            "unsqueeze.default",
            "div.Tensor",
            "linear.default",
            "sin.default",
            "embedding.default",
            "add.Tensor",
            "linear.default",
            "linear.default",
            "unsqueeze.default",
            "mul.Tensor",
            "linear.default",
            "unsqueeze.default",
            "add.Tensor",
        ]
    }
    assert by_rate(hoisted) == {
        Rate.ONCE: ["embedding.default"],
        Rate.ONCE_TIMESTEP: ["add.Tensor", "linear.default", "unsqueeze.default"],
        Rate.STEP: ["linear.default", "mul.Tensor", "add.Tensor"],
    }


def test_stages_and_ports(hoisted: Program) -> None:
    assert [stage.name for stage in hoisted.stages] == ["once", "once_timestep", "step"]
    once, combined, step = hoisted.stages
    assert [str(item) for item in once.inputs] == ["c [B] int64"]
    assert [item.shape for item in once.outputs] == [(None, 6)]
    assert [item.shape for item in combined.inputs] == [(None, 6), (None, 6)]
    assert {item.name for item in combined.inputs} == {once.outputs[0].name} | ({*hoisted.tables} - names(step))
    assert [item.shape for item in combined.outputs] == [(None, 1, 5)]
    assert names(step) == {"x", combined.outputs[0].name} | ({*hoisted.tables} - names(combined))
    assert [str(item) for item in step.outputs] == ["y [B, 3, 5] float32"]


def names(stage: Stage) -> set[str]:
    return {item.name for item in stage.inputs}


def test_tables_are_the_values_of_every_grid_call(hoisted: Program) -> None:
    """sin(time(t / 1000)) and shift of it, at 1000, 750, 500 and 250."""
    model = Modulated()
    with torch.no_grad():
        time = torch.sin(model.time(torch.tensor([[1.0], [0.75], [0.5], [0.25]])))
        wanted = [time.numpy(), model.shift(time)[:, None].numpy()]
    tables = sorted(hoisted.tables.values(), key=lambda table: table.ndim)
    assert [table.shape for table in tables] == [(4, 6), (4, 1, 5)]
    assert all(table.dtype == np.float32 for table in tables)
    for table, value in zip(tables, wanted, strict=True):
        np.testing.assert_allclose(table, value, rtol=1e-6, atol=1e-7)


def test_weights_of_tabulated_values_leave_the_program(program: Program, hoisted: Program) -> None:
    """time and shift, 6 + 6 and 6 x 5 + 5 weights."""
    assert program.parameters() - hoisted.parameters() == 12 + 35
    assert sorted(hoisted.step.tensors()) == ["body.bias", "body.weight"]


def test_the_argument_is_not_changed(program: Program, hoisted: Program) -> None:
    assert [stage.name for stage in program.stages] == ["step"] and program.tables == {}
    assert len(operators(program.step)) == 13


def test_changed_counts_the_operators_that_left(program: Program) -> None:
    """10 of the step stage's 13, then 4 of the 5 or more that were cut into once×timestep."""
    result = hoist(program)
    assert result.changed >= 10 and result.refused == () and not result.identity
    assert program_flops(program) - program_flops(result.program) == 2 * (1 * 6 + 6 * 5 + 6 * 5)


# -- numbers


@pytest.mark.parametrize("count", [1, 5])
def test_samples_are_equal(program: Program, hoisted: Program, count: int) -> None:
    assert_same_samples(program, hoisted, count)


def test_samples_of_the_tiny_dit_are_equal(tiny_program: Program, tiny_hoisted: PassResult) -> None:
    assert_same_samples(tiny_program, tiny_hoisted.program)


def test_the_manager_finds_no_drift(program: Program) -> None:
    (record,) = run_passes(program, [Step(Hoist(HoistOptions()))], context_of(program, Path("unused"))).records
    assert record.outcome == "changed" and record.drift <= EXACT


def test_unguided_and_guided_loops_agree(program: Program) -> None:
    """One branch alone, and rows that are all the same."""
    assert program.loop is not None
    unguided = replace(program, loop=program.loop.model_copy(update={"guidance": None}))
    assert_same_samples(unguided, hoist(unguided).program, count=3)


# -- what the step stage keeps


def test_the_step_stage_computes_nothing_of_a_lower_rate(tiny_hoisted: PassResult) -> None:
    program = tiny_hoisted.program
    rates = node_rates(program)
    below = [node.name for node in calls(program.step) if rates[node] not in (Rate.STEP, Rate.CONST)]
    assert below == []
    for stage in program.stages:
        assert {rates[node] for node in calls(stage)} <= {stage.rate, Rate.CONST}


def test_the_step_stage_holds_no_weight_of_a_lower_rate(tiny_program: Program, tiny_hoisted: PassResult) -> None:
    before, program = parameters_by_rate(tiny_program), tiny_hoisted.program
    assert program.step.parameters() == before[Rate.STEP]
    after = {stage.rate: stage.parameters() for stage in program.stages}
    assert after == {rate: before[rate] for rate in (Rate.ONCE, Rate.ONCE_TIMESTEP, Rate.STEP)}
    assert parameters_by_rate(program)[Rate.TIMESTEP] == 0  # in tables


def test_the_timestep_is_no_input_of_the_tiny_dit_any_more(tiny_hoisted: PassResult) -> None:
    names = {stage.name: {item.name for item in stage.inputs} for stage in tiny_hoisted.program.stages}
    assert not any("timestep" in inputs or "class_labels" in inputs for name, inputs in names.items() if name != "once")
    assert names["once"] == {"class_labels"}


def test_the_reference_checkpoint(reference_program: Program) -> None:
    """Width D = 192, 8 blocks, 10 classes and the unconditional row, patches 4 x 4 of one channel, 8 x 8 tokens."""
    program = reference_program
    before, result = parameters_by_rate(program), hoist(program)
    assert before == {
        Rate.CONST: 0,
        Rate.ONCE: 16_896,  # 8 tables of 11 D
        Rate.TIMESTEP: 691_328,  # 8 (256 D + D + D D + D) and 128 frequencies
        Rate.ONCE_TIMESTEP: 1_852_800,  # 8 (D 6 D + 6 D) and the last D 2 D + 2 D
        Rate.STEP: 3_571_408,  # 16 D + D + 64 D; 8 (4 (D D + D) + D 4 D + 4 D + 4 D D + D); D 16 + 16
    }
    assert sum(before.values()) == 6_132_432
    assert {stage.name: stage.parameters() for stage in result.program.stages} == {
        "once": 16_896,
        "once_timestep": 1_852_800,
        "step": 3_571_408,
    }
    assert result.refused == ()
    assert {table.shape[0] for table in result.program.tables.values()} == {50}
    before_flops, after_flops = program_flops(program), program_flops(result.program)
    assert before_flops - after_flops == 2 * (9 * (256 * 192 + 192 * 192) + 8 * 6 * 192 * 192 + 2 * 192 * 192)


# -- again, or for nothing


def test_a_second_run_changes_nothing(hoisted: Program, tiny_hoisted: PassResult) -> None:
    for program in (hoisted, tiny_hoisted.program):
        result = hoist(program)
        assert (result.changed, result.identity) == (0, True)


def test_nothing_to_hoist_fails_unless_optional() -> None:
    program = denoiser(lambda x, t: torch.tanh(x) * t[:, None], torch.randn(2, 3), torch.full((2,), 5.0))
    steps = [Step(Hoist(HoistOptions()))]
    context = context_of(program, Path("unused"))
    only_latent = denoiser(lambda x, t: torch.tanh(x + t.mean()), torch.randn(2, 3), torch.full((2,), 5.0))
    with pytest.raises(
        StepfoldError, match=r"pass hoist: expected to change something.*mean: its first dimension is not"
    ):
        run_passes(only_latent, steps, replace(context, original=only_latent))
    assert run_passes(program, steps, context).records[0].outcome == "changed"  # t[:, None] moves into a table


def test_a_component_has_no_loop() -> None:
    assert (
        Hoist(HoistOptions()).not_applicable(component(lambda x: x.relu(), torch.randn(2, 3)))
        == "the program has no loop"
    )


def test_hoisting_after_dynamic_quantization_is_refused(tiny_program: Program) -> None:
    """A scale of the rows of a stage of lower rate is not the scale of the rows of the step."""
    context = context_of(tiny_program, Path("unused"))
    quantized = Quantize(QuantizeOptions(smooth=None)).run(tiny_program, context).program
    with pytest.raises(UsageError, match=r"hoist: expected a program without dynamic .* Put hoist before quantize"):
        run_passes(quantized, [Step(Hoist(HoistOptions()))], context)
