"""A loop whose parts have stages of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import modulated, samples_of

from stepfold.ir.cost import program_flops, stage_flops
from stepfold.ir.edit import add_buffer, copy_graph, finish
from stepfold.ir.parts import alone, put_back, split
from stepfold.ir.program import Program, Stage
from stepfold.ir.verify import verify
from stepfold.loop.errors import StepfoldError

CALLS = 4


@pytest.fixture(scope="module")
def program() -> Program:
    return modulated()


def doubled(stage: Stage) -> Stage:
    """The stage with its output times two."""
    graph = copy_graph(stage)
    output = graph.graph.output_node()
    (value,) = output.args[0]  # type: ignore[misc]
    with graph.graph.inserting_before(output):
        two = graph.graph.get_attr(add_buffer(graph, "two", torch.tensor(2.0)))
        output.args = ((graph.graph.call_function(torch.ops.aten.mul.Tensor, (value, two)),),)
    return finish(stage, graph)


def test_a_split_program_computes_the_same_with_the_same_weights(program: Program) -> None:
    parts = split(program, range(1, 3))
    verify(parts)
    assert [(s.name, s.calls) for s in parts.steps] == [
        ("step_0_1", range(1)),
        ("step_1_3", range(1, 3)),
        ("step_3_4", range(3, 4)),
    ]
    assert (samples_of(parts) == samples_of(program)).all()
    first, second, _ = (stage.tensors() for stage in parts.steps)
    assert all(first[name] is second[name] for name in first)


@given(st.lists(st.tuples(st.integers(0, CALLS - 1), st.integers(1, CALLS)).filter(lambda p: p[0] < p[1]), max_size=4))
def test_however_often_it_is_cut_each_call_has_one_stage(program: Program, cuts: list[tuple[int, int]]) -> None:
    parts = program
    for first, stop in cuts:
        parts = split(parts, range(first, stop))
        inside = [call for s in parts.steps for call in (s.calls or range(CALLS)) if call in range(first, stop)]
        outside = [s for s in parts.steps if set(s.calls or range(CALLS)).isdisjoint(range(first, stop))]
        assert len(inside) == stop - first
        assert len(inside) + sum(len(s.calls or ()) for s in outside) == CALLS  # no stage runs on both sides
    verify(parts)
    assert all(s.name == "step" if s.calls is None else s.name.count("_") == 2 for s in parts.steps)
    again = split(parts, range(*cuts[-1])) if cuts else parts
    assert again.stages == parts.stages


def test_only_the_calls_of_a_changed_part_change(program: Program) -> None:
    parts = split(program, range(3, 4))
    late = parts.steps[1]
    view = alone(parts, late)
    verify(view)
    assert view.steps == (replace(late, calls=None),)
    changed = put_back(parts, late, view.with_stage(doubled(view.step)))
    verify(changed)
    assert changed.steps[0] is parts.steps[0] and changed.steps[1].calls == late.calls
    bound, before = changed.bind(), program.bind()
    inputs = {name: value.numpy() for name, value in program.example.items()}
    for call, factor in ((0, 1), (2, 1), (3, 2)):
        assert (bound.evaluate(inputs, call)[0] == factor * before.evaluate(inputs, call)[0]).all()
    everywhere = program.with_stage(doubled(program.step))
    assert (samples_of(changed) != samples_of(program)).any() and (samples_of(changed) != samples_of(everywhere)).any()


def test_a_stage_that_shares_the_loop_needs_to_know_the_call(program: Program) -> None:
    inputs = {name: value.numpy() for name, value in program.example.items()}
    with pytest.raises(ValueError, match="is evaluated at a grid call"):
        split(program, range(1)).bind().evaluate(inputs)


def test_an_evaluation_costs_the_average_of_the_calls(program: Program) -> None:
    parts = split(program, range(1))
    assert program_flops(parts) == stage_flops(program.step)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ((range(1), range(2, 4)), r"calls with one are \[0, 2, 3\]"),
        ((range(2), range(1, 4)), r"calls with one are \[0, 1, 1, 2, 3\]"),
        ((range(2), range(2, 5)), r"calls with one are \[0, 1, 2, 3, 4\]"),
    ],
)
def test_a_call_without_or_with_two_stages_is_refused(program: Program, calls, message: str) -> None:
    parts = split(program, range(1))
    stages = tuple(replace(stage, calls=own) for stage, own in zip(parts.stages, calls, strict=True))
    with pytest.raises(StepfoldError, match=message):
        verify(replace(parts, stages=stages))


def test_parts_compute_the_same_values(program: Program) -> None:
    parts = split(program, range(1))
    other = replace(parts.steps[1], outputs=(replace(parts.steps[1].outputs[0], name="z"),))
    with pytest.raises(StepfoldError, match="shares the loop with stages of other outputs"):
        verify(parts.with_stage(other))
