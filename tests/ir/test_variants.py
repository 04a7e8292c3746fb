"""Slots with several variants: who runs when, and what a pass does to some of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import component, modulated, samples_of

from stepfold.ir.cost import program_flops, stage_flops
from stepfold.ir.edit import add_buffer, copy_graph, finish
from stepfold.ir.program import Program, Slot, Stage, slots_of
from stepfold.ir.variants import alone, numbers_at, put_back, split
from stepfold.ir.verify import verify
from stepfold.loop.errors import StepfoldError
from stepfold.loop.ports import Rate

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


def slot_of(program: Program) -> Slot:
    (slot,) = program.computing
    return slot


def test_a_split_program_computes_the_same_with_the_same_weights(program: Program) -> None:
    parts = split(program, range(1, 3))
    verify(parts)
    slot = slot_of(parts)
    assert [stage.name for stage in slot.variants] == ["step", "step_1"] and slot.by_call == (0, 1, 1, 0)
    assert (samples_of(parts) == samples_of(program)).all()
    first, second = (stage.tensors() for stage in slot.variants)
    assert all(first[name] is second[name] for name in first)


@given(st.lists(st.tuples(st.integers(0, CALLS - 1), st.integers(1, CALLS)).filter(lambda p: p[0] < p[1]), max_size=4))
def test_however_often_it_is_split_no_variant_runs_on_both_sides(program: Program, cuts: list[tuple[int, int]]) -> None:
    parts = program
    for first, stop in cuts:
        parts = split(parts, range(first, stop))
        by_call = slot_of(parts).by_call or (0,) * CALLS
        inside, outside = set(by_call[first:stop]), set(by_call[:first] + by_call[stop:])
        assert not inside & outside and inside == set(numbers_at(parts, range(first, stop)))
    verify(parts)
    slot = slot_of(parts)
    assert set(slot.by_call or (0,)) == set(range(len(slot.variants))), "no variant is left without a call"
    again = split(parts, range(*cuts[-1])) if cuts else parts
    assert again.slots == parts.slots


def test_only_the_calls_of_a_changed_variant_change(program: Program) -> None:
    parts = split(program, range(3, 4))
    (number,) = numbers_at(parts, [3])
    view = alone(parts, number)
    verify(view)
    assert view.step is slot_of(parts).variants[number] and slot_of(view).by_call is None
    changed = put_back(parts, view.with_stage(doubled(view.step)))
    verify(changed)
    assert slot_of(changed).original is slot_of(parts).original and slot_of(changed).by_call == (0, 0, 0, 1)
    bound, before = changed.bind(), program.bind()
    inputs = {name: value.numpy() for name, value in program.example.items()}
    for call, factor in ((0, 1), (2, 1), (3, 2)):
        assert (bound.evaluate(inputs, call)[0] == factor * before.evaluate(inputs, call)[0]).all()
    everywhere = program.with_stage(doubled(program.step))
    assert (samples_of(changed) != samples_of(program)).any() and (samples_of(changed) != samples_of(everywhere)).any()


def test_a_slot_without_a_variant_of_some_number_takes_its_original(program: Program) -> None:
    lone = Slot("other", slot_of(program).variants)
    two = replace(split(program, range(1)), slots=(*split(program, range(1)).slots, lone))
    assert numbers_at(two) == [0, 1] and [slot.original.name for slot in alone(two, 1).slots][-2:] == ["step_1", "step"]


def test_a_program_whose_variants_differ_by_call_needs_to_know_the_call(program: Program) -> None:
    inputs = {name: value.numpy() for name, value in program.example.items()}
    with pytest.raises(ValueError, match="is evaluated at a grid call"):
        split(program, range(1)).bind().evaluate(inputs)


def test_an_evaluation_costs_the_average_of_the_calls(program: Program) -> None:
    parts = split(program, range(1))
    assert program_flops(parts) == stage_flops(program.step)


@pytest.mark.parametrize("by_call", [(0, 1, 0), (0, 1, 0, 1, 0), (0, 2, 0, 1), (-1, 0, 1, 0)])
def test_a_call_without_a_variant_is_refused(program: Program, by_call: tuple[int, ...]) -> None:
    parts = split(program, range(1))
    slots = tuple(replace(slot, by_call=by_call) if slot.by_call else slot for slot in parts.slots)
    with pytest.raises(StepfoldError, match="one of its 2 variants at each of 4 calls"):
        verify(replace(parts, slots=slots))


def test_variants_compute_the_same_values_at_one_rate(program: Program) -> None:
    parts = split(program, range(1))
    late = slot_of(parts).variants[1]
    other = replace(late, outputs=(replace(late.outputs[0], name="z"),))
    with pytest.raises(StepfoldError, match="shares a slot with stages of other outputs"):
        verify(parts.with_stage(other))
    with pytest.raises(StepfoldError, match="shares a slot with stages of another rate"):
        verify(parts.with_stage(replace(late, rate=Rate.ONCE)))


def test_only_a_computing_slot_has_variants() -> None:
    layer = component(torch.nn.Linear(4, 4), torch.randn(2, 4))
    (slot,) = layer.slots
    two = replace(slot, variants=(slot.original, replace(slot.original, name="other")))
    with pytest.raises(StepfoldError, match="only a slot of rate step has several variants"):
        verify(replace(layer, slots=(two,)))


def test_two_stages_of_one_name_are_refused(program: Program) -> None:
    with pytest.raises(StepfoldError, match="another stage has its name"):
        verify(replace(program, slots=slots_of(program.step, program.step)))
