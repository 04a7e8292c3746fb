"""Rates by dataflow, never by names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from programs import component, denoiser, modulated

from stepfold.ir.analysis.rates import input_roles, node_rates, node_roles, parameters_by_rate, read_values
from stepfold.ir.edit import copy_graph, finish, output_nodes
from stepfold.ir.program import Program
from stepfold.loop.ports import Rate

aten = torch.ops.aten
X, T, C = torch.randn(2, 3), torch.full((2,), 5.0), torch.arange(2)


def rate_of(function) -> Rate:
    """The rate of the first output of f(x, t, c); the latent reaches the second."""
    program = denoiser(lambda x, t, c: (function(x, t, c), x + t[:, None] + c[:, None]), X, T, C, guided=False)
    return node_rates(program)[output_nodes(program.step)[0]]


@pytest.mark.parametrize(
    ("function", "rate"),
    [
        (lambda x, t, c: x * 2, Rate.STEP),
        (lambda x, t, c: torch.sin(t), Rate.TIMESTEP),
        (lambda x, t, c: c * 2, Rate.ONCE),
        (lambda x, t, c: torch.sin(t) + c, Rate.ONCE_TIMESTEP),
        (lambda x, t, c: x * torch.sin(t)[:, None], Rate.STEP),
        (lambda x, t, c: x[:, 0] * 0 + t, Rate.STEP),  # dataflow, not values
        (lambda x, t, c: torch.cat([c[:, None], t[:, None]], 1).split(1, 1)[0], Rate.ONCE_TIMESTEP),  # through a tuple
        (lambda x, t, c: torch.where(c > 0, t, 1.0), Rate.ONCE_TIMESTEP),
    ],
)
def test_a_value_takes_the_roles_of_all_it_reads(function, rate: Rate) -> None:
    assert rate_of(function) is rate


SHAPE_ONLY = {
    "size": lambda x, t, c: t.reshape(x.shape[0], 1),
    "type_as": lambda x, t, c: t.type_as(x) + t,
    "expand_as": lambda x, t, c: t[:, None].expand_as(x),
    "view_as": lambda x, t, c: torch.stack([t, t, t], 1).view_as(x),
    "new_zeros": lambda x, t, c: x.new_zeros(x.shape[0]) + t,
    "new_ones": lambda x, t, c: x.new_ones(x.shape[0]) + t,
    "new_full": lambda x, t, c: x.new_full((x.shape[0],), 2.0) + t,
    "zeros_like": lambda x, t, c: torch.zeros_like(x)[:, 0] + t,
    "ones_like": lambda x, t, c: torch.ones_like(x)[:, 0] + t,
    "full_like": lambda x, t, c: torch.full_like(x, 3.0)[:, 0] + t,
}


@pytest.mark.parametrize("name", SHAPE_ONLY)
def test_shape_and_dtype_do_not_taint(name: str) -> None:
    assert rate_of(SHAPE_ONLY[name]) is Rate.TIMESTEP


READ = {
    aten.type_as.default: "a",
    aten.expand_as.default: "a",
    aten.view_as.default: "a",
    aten.zeros_like.default: "",
    aten.empty_like.default: "",
    aten.new_empty.default: "",
    aten.new_zeros.default: "",
    aten.sym_numel.default: "",
    aten.add.Tensor: "ab",
    aten.mul.Tensor: "ab",
}


@pytest.mark.parametrize("operator", READ, ids=str)
def test_which_arguments_are_read(operator) -> None:
    """Also of operators that captures write otherwise."""
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    arguments = (a, b) if len(operator._schema.arguments) > 1 and READ[operator] else (a,)
    assert "".join(node.name for node in read_values(graph.call_function(operator, arguments))) == READ[operator]


def test_a_value_of_shapes_alone_is_constant() -> None:
    assert rate_of(lambda x, t, c: torch.zeros_like(x).relu() + 1) is Rate.CONST


@pytest.mark.parametrize("name", ["mul", "masked_fill"])
def test_other_second_arguments_do_taint(name: str) -> None:
    """The positions of SHAPE_ONLY are of those operators only."""
    functions = {"mul": lambda x, t, c: t * x[:, 0], "masked_fill": lambda x, t, c: t.masked_fill(x[:, 0] > 0, 0.0)}
    assert rate_of(functions[name]) is Rate.STEP


def test_roles_pass_through_stages_and_tables() -> None:
    """A stage output has the roles of what it was computed from, a table those of the timestep."""
    program = denoiser(lambda x, t, c: x + t[:, None] * c[:, None], X, T, C, guided=False)
    tabled = replace(program, inputs=(program.inputs[0], program.inputs[2]), tables={"t": np.zeros(4, np.float32)})
    assert input_roles(tabled) == {
        "x": {"state"},
        "c": {"condition"},
        "t": {"timestep"},
        "y": {"state", "timestep", "condition"},
    }
    assert set(node_rates(tabled).values()) == set(node_rates(program).values())


def test_a_constant_input_has_no_role() -> None:
    program = denoiser(lambda x, t, c: x + t[:, None] * c[:, None], X, T, C, guided=False)
    constant = replace(program, inputs=(*program.inputs[:2], replace(program.inputs[2], role="constant")))
    assert input_roles(constant)["c"] == frozenset()
    rates = node_rates(constant)
    assert rates[program.step.graph.graph.find_nodes(op="placeholder")[2]] is Rate.CONST


def test_node_roles_follow_the_ports_not_the_placeholders() -> None:
    program = denoiser(lambda x, t, c: x + t[:, None] * c[:, None], X, T, C, guided=False)
    roles = node_roles(program.step, {"x": frozenset({"condition"}), "t": frozenset(), "c": frozenset({"timestep"})})
    assert roles[output_nodes(program.step)[0]] == {"condition", "timestep"}


# -- weights


def test_weights_by_the_rate_that_reads_them() -> None:
    """classes 4 x 6 by c; time 1 x 6 + 6 and shift 6 x 5 + 5 by t; gain 6 x 5 + 5 by both; body 5 x 5 + 5 by x."""
    program = modulated()
    assert parameters_by_rate(program) == {
        Rate.CONST: 0,
        Rate.ONCE: 24,
        Rate.TIMESTEP: 12 + 35,
        Rate.ONCE_TIMESTEP: 35,
        Rate.STEP: 30,
    }


def test_a_shared_weight_counts_once_at_its_highest_rate() -> None:
    layer = torch.nn.Linear(3, 3)

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.layer(t[:, None].expand(-1, 3))

    counts = parameters_by_rate(denoiser(Shared(), X, T))
    assert counts[Rate.STEP] == 12 and sum(counts.values()) == 12


def test_a_weight_that_two_nodes_hold_counts_once_at_its_highest_rate() -> None:
    """First the step reads it, then the timestep, each through a node of its own."""
    program = denoiser(lambda x, t: x * 2 + (t * 3)[:, None], X, T)
    graph = copy_graph(program.step)
    graph.register_buffer("scale", torch.ones(1))
    for node in [node for node in graph.graph.nodes if node.target is aten.mul.Tensor]:
        with graph.graph.inserting_before(node):
            node.update_arg(1, graph.graph.get_attr("scale"))
    program = program.with_stage(finish(program.step, graph))
    counts = parameters_by_rate(program)
    assert counts[Rate.STEP] == 1 and sum(counts.values()) == 1


def test_a_weight_behind_a_constant_expression_counts_where_that_is_read() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x + t[:, None] * torch.zeros_like(x).add(self.weight)  # of rate const until t reads it

    program = denoiser(Scaled(), X, T)
    assert parameters_by_rate(program)[Rate.TIMESTEP] == 3


def test_rates_of_the_tiny_dit(tiny_program: Program) -> None:
    """Width D = 16, 4 classes and the unconditional row, one block of MLP ratio 4, patches 2 x 2 of one channel.

    once: the class table 5 D. timestep: 256 -> D -> D embedding with biases and its 128 frequencies.
    once×timestep: D -> 6 D of the block's norm, D -> 2 D of the last one. step: patch 4 D + D, 4 attention linears,
    D -> 4 D -> D, and D -> 4 of the output, with the 16 x D positions.
    """
    D = 16
    assert parameters_by_rate(tiny_program) == {
        Rate.CONST: 0,
        Rate.ONCE: 5 * D,
        Rate.TIMESTEP: (256 * D + D) + (D * D + D) + 128,
        Rate.ONCE_TIMESTEP: (D * 6 * D + 6 * D) + (D * 2 * D + 2 * D),
        Rate.STEP: 5 * D + 4 * (D * D + D) + (D * 4 * D + 4 * D) + (4 * D * D + D) + (D * 4 + 4) + 16 * D,
    }


def test_they_sum_to_all_parameters(tiny_program: Program) -> None:
    models = [tiny_program, modulated(), component(torch.nn.Linear(3, 4), X)]
    for program in models:
        assert sum(parameters_by_rate(program).values()) == program.parameters() > 0


def test_a_component_is_of_one_rate() -> None:
    program = component(torch.nn.Linear(3, 4), X)
    assert parameters_by_rate(program)[Rate.ONCE] == 16
