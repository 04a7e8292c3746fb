"""Cutting a stage at named values, weights and all."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from programs import calls, component, denoiser, modulated, operators

from stepfold.ir.edit import (
    add_buffer,
    copy_graph,
    extract,
    finish,
    output_nodes,
    reads_batch,
    replace_by_inputs,
)
from stepfold.ir.program import Program, Stage, reference
from stepfold.ir.verify import verify
from stepfold.loop.ports import Port, Rate

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program() -> Program:
    return modulated()


def values_of(program: Program) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in program.example.items()}


def gain_and_shift(stage: Stage) -> list[torch.fx.Node]:
    """The two [B, 5] values that do not depend on x."""
    linears = [node for node in calls(stage) if node.target is aten.linear.default]
    return [node for node in linears if node.meta["shape"] == (None, 5)]


def test_cut_in_two_computes_the_same(program: Program) -> None:
    """lower(t, c) -> gain, shift; upper(x, gain, shift) -> y."""
    stage, inputs = program.step, values_of(program)
    nodes = gain_and_shift(stage)
    lower = extract(stage, "lower", Rate.ONCE_TIMESTEP, nodes, ["gain", "shift"])
    upper = replace_by_inputs(stage, nodes, ["gain", "shift"])
    assert [item.name for item in lower.inputs] == ["t", "c"]
    assert [str(item) for item in lower.outputs] == ["gain [B, 5] float32", "shift [B, 5] float32"]
    assert [item.name for item in upper.inputs] == ["x", "gain", "shift"]  # t and c are read no more
    assert (lower.rate, lower.name, upper.rate, upper.name) == (Rate.ONCE_TIMESTEP, "lower", Rate.STEP, "step")
    gain, shift = reference(lower)(inputs)
    (received,) = reference(upper)({"x": inputs["x"], "gain": gain, "shift": shift})
    (wanted,) = reference(stage)(inputs)
    np.testing.assert_array_equal(received, wanted)


def test_a_cut_shares_weights_and_leaves_the_stage_alone(program: Program) -> None:
    stage = program.step
    before = str(stage.graph.graph)
    nodes = gain_and_shift(stage)
    lower = extract(stage, "lower", Rate.ONCE_TIMESTEP, nodes, ["gain", "shift"])
    upper = replace_by_inputs(stage, nodes, ["gain", "shift"])
    assert str(stage.graph.graph) == before
    assert sorted(upper.tensors()) == ["body.bias", "body.weight"]
    assert not set(lower.tensors()) & set(upper.tensors())
    assert set(lower.tensors()) | set(upper.tensors()) == set(stage.tensors())
    for part in (lower, upper):
        for name, tensor in part.tensors().items():
            assert tensor.data_ptr() == stage.tensors()[name].data_ptr()


def test_names_with_dots_become_ports_of_that_name(program: Program) -> None:
    nodes = gain_and_shift(program.step)
    upper = replace_by_inputs(program.step, nodes, ["step.gain", "step.shift"])
    assert [item.name for item in upper.inputs] == ["x", "step.gain", "step.shift"]


def test_the_batch_is_read_from_an_input_of_the_new_stage() -> None:
    """The captured graph reads B from x; what is cut out has no x."""

    def f(x, t, c):
        shift = (t * 2).reshape(x.shape[0], 1, 1).expand(x.shape[0], 2, 1)
        return x * shift.reshape(x.shape[0], 2) + c[:, None]

    program = denoiser(f, torch.randn(2, 2), torch.full((2,), 5.0), torch.arange(2), guided=False)
    stage = program.step
    (value,) = [node for node in calls(stage) if node.target is aten.expand.default]
    lower = extract(stage, "lower", Rate.TIMESTEP, [value], ["shift"])
    assert [item.name for item in lower.inputs] == ["t"]
    sizes = [node for node in calls(lower) if reads_batch(node)]
    (placeholder,) = lower.graph.graph.find_nodes(op="placeholder")
    assert sizes and all(node.args[0] is placeholder for node in sizes)
    (received,) = reference(lower)({"t": np.arange(7, dtype=np.float32)})
    np.testing.assert_array_equal(received[:, 1, 0], np.arange(7) * 2)
    upper = replace_by_inputs(stage, [value], ["shift"])
    assert [item.name for item in upper.inputs] == ["x", "c", "shift"]


def test_reads_batch_is_not_fooled_by_a_multiple_of_it() -> None:
    """size(flatten(x), 0) is B T."""
    program = component(lambda x: x.relu(), torch.randn(2, 3, 4))
    graph = copy_graph(program.step)
    relu = next(node for node in graph.graph.nodes if node.target is aten.relu.default)
    with graph.graph.inserting_after(relu):
        flat = graph.graph.call_function(aten.flatten.using_ints, (relu, 0, 1))
    with graph.graph.inserting_after(flat):
        rows = graph.graph.call_function(aten.sym_size.int, (flat, 0))
        batch = graph.graph.call_function(aten.sym_size.int, (relu, 0))
        tokens = graph.graph.call_function(aten.sym_size.int, (relu, 1))
    from stepfold.ir.shapes import propagate

    propagate(graph, program.step.inputs)
    assert [reads_batch(node) for node in (rows, batch, tokens, relu)] == [False, True, False, False]


def test_finish_drops_dead_code_unused_inputs_and_weights() -> None:
    weight = torch.nn.Linear(4, 4)
    program = component(lambda x, y: x.relu() + torch.tanh(y) * 2, torch.randn(2, 4), torch.randn(2, 4))
    graph = copy_graph(program.step)
    graph.register_buffer("unread", weight.weight.detach())
    add = next(node for node in graph.graph.nodes if node.target is aten.add.Tensor)
    add.replace_all_uses_with(add.args[0])  # type: ignore[arg-type]
    slim = finish(program.step, graph)
    assert operators(slim) == ["relu.default"]
    assert [item.name for item in slim.inputs] == ["x"]
    assert slim.parameters() == 0 and not hasattr(slim.graph, "unread")
    assert len(program.step.inputs) == 2 and len(operators(program.step)) == 4  # the argument is as it was


@pytest.mark.parametrize("first", ["x", "y"])
def test_finish_keeps_no_input_for_its_batch_alone(first: str) -> None:
    """reshape(y, [B, 4]): the captured graph reads B from one of its inputs, and y has it too."""

    def reads_x(x, y):
        return y.reshape(x.shape[0], 4).relu() + 0 * x

    x, y = torch.randn(2, 4), torch.randn(2, 2, 2)
    program = component(reads_x, x, y) if first == "x" else component(lambda y, x: reads_x(x, y), y, x)
    graph = copy_graph(program.step)
    add = next(node for node in graph.graph.nodes if node.target is aten.add.Tensor)
    add.replace_all_uses_with(add.args[0])  # type: ignore[arg-type]
    slim = finish(program.step, graph)
    assert [item.name for item in slim.inputs] == ["y"]
    (received,) = reference(slim)({"y": -np.ones((5, 2, 2), np.float32)})
    np.testing.assert_array_equal(received, np.zeros((5, 4), np.float32))


def test_finish_sets_shapes_of_new_nodes(program: Program) -> None:
    graph = copy_graph(program.step)
    output = graph.graph.output_node()
    (last,) = output.args[0]  # type: ignore[misc]
    with graph.graph.inserting_before(output):
        doubled = graph.graph.call_function(aten.mul.Tensor, (last, 2.0))
    output.args = ((doubled,),)
    stage = finish(program.step, graph)
    verify(program.with_stage(stage))
    (node,) = output_nodes(stage)
    assert node.meta["shape"] == (None, 3, 5)
    (received,), (wanted,) = (reference(s)(values_of(program)) for s in (stage, program.step))
    np.testing.assert_array_equal(received, 2 * wanted)


def test_copy_graph_may_be_edited(program: Program) -> None:
    before = str(program.step.graph.graph)
    graph = copy_graph(program.step)
    for node in graph.graph.nodes:
        if node.target is aten.sin.default:
            node.target = aten.cos.default
    assert "cos" in str(graph.graph)
    assert str(program.step.graph.graph) == before


def test_buffers_get_free_names(program: Program) -> None:
    graph = copy_graph(program.step)
    names = [add_buffer(graph, "blocks.0/to_q.weight", torch.ones(i + 1)) for i in range(3)]
    assert names == ["blocks_0_to_q_weight", "blocks_0_to_q_weight_1", "blocks_0_to_q_weight_2"]
    assert [getattr(graph, name).numel() for name in names] == [1, 2, 3]


def test_output_nodes_are_those_of_the_ports() -> None:
    program = component(lambda x: (x.relu(), x.exp()), torch.randn(2, 4))
    names = [str(node.target) for node in output_nodes(program.step)]
    assert names == ["aten.relu.default", "aten.exp.default"]
    assert len(program.step.outputs) == 2


def test_a_program_output_can_be_cut_off() -> None:
    """A stage whose output is itself an input: the identity."""
    program = component(lambda x: x.relu() * 2, torch.randn(2, 4))
    (value,) = output_nodes(program.step)
    slim = replace_by_inputs(program.step, [value], ["y"])
    assert operators(slim) == [] and [item.name for item in slim.inputs] == ["y"]
    assert replace(slim, inputs=(Port("y", (None, 4), "float32"),)) == slim
