"""Every rule of a well-formed program, broken on purpose."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from programs import modulated

from stepfold.ir.edit import copy_graph
from stepfold.ir.program import Program, Stage, slots_of
from stepfold.ir.verify import verify
from stepfold.loop.errors import StepfoldError
from stepfold.loop.ports import Port, Rate

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program() -> Program:
    return modulated()


def restaged(program: Program, **changes) -> Program:
    return program.with_stage(replace(program.step, **changes))


def edited(edit: Callable[[torch.fx.GraphModule], None]) -> Callable[[Program], Program]:
    def broken(program: Program) -> Program:
        graph = copy_graph(program.step)
        for node, original in zip(graph.graph.nodes, program.step.graph.graph.nodes, strict=True):
            node.meta = dict(original.meta)
        edit(graph)
        return restaged(program, graph=graph)

    return broken


def before_use(program: Program) -> Program:
    """The first call reads a node that stands behind it."""
    graph = copy_graph(program.step)
    first, *_, last = [node for node in graph.graph.nodes if node.op == "call_function"]
    first.args = (last, *first.args[1:])
    return restaged(program, graph=graph)


def as_module(graph: torch.fx.GraphModule) -> None:
    graph.add_module("inner", torch.nn.ReLU())
    node = next(node for node in graph.graph.nodes if node.target is aten.sin.default)
    node.op, node.target = "call_module", "inner"


def forget_value(graph: torch.fx.GraphModule) -> None:
    del next(node for node in graph.graph.nodes if node.target is aten.sin.default).meta["val"]


def lose_weight(graph: torch.fx.GraphModule) -> None:
    next(node for node in graph.graph.nodes if node.op == "get_attr").target = "nowhere"


def second(program: Program, **changes) -> Program:
    """A second stage behind the first."""
    extra = Stage("extra", Rate.STEP, program.step.graph, program.step.inputs, (Port("z", (None, 3, 5), "float32"),))
    return replace(program, slots=slots_of(program.step, replace(extra, **changes)))


X = Port("x", (None, 3, 5), "float32")
BROKEN = {
    "no source": (lambda p: restaged(p, inputs=(X, Port("t", (None,), "float32"), Port("k", (None,), "int64"))),
                  "input 'k' is neither a program input nor an output of an earlier stage"),
    "later source": (
        lambda p: second(p).with_stage(replace(p.step, inputs=(Port("z", (None, 3, 5), "float32"), *p.step.inputs[1:]))),
        "input 'z' is neither",
    ),
    "dtype of a source": (lambda p: restaged(p, inputs=(X, Port("t", (None,), "float64"), p.step.inputs[2])),
                          "input t [B] float64"),
    "shape of a source": (lambda p: replace(p, inputs=(replace(p.inputs[0], port=Port("x", (None, 4, 5), "float32")),
                          *p.inputs[1:])), "input x [B, 3, 5] float32 comes from x [B, 4, 5] float32"),
    "table of a source": (lambda p: replace(p, inputs=p.inputs[:1] + p.inputs[2:], tables={"t": np.zeros((4, 2))}),
                          "input t [B] float32 comes from t [B, 2] float64"),
    "rate of a source": (lambda p: restaged(p, rate=Rate.ONCE_TIMESTEP),
                         "input 'x' changes at rate step, the stage runs at once×timestep"),
    "output twice": (lambda p: second(p, outputs=p.step.outputs), "output 'y' exists already"),
    "output of an input's name": (lambda p: restaged(p, outputs=(X,)), "output 'x' exists already"),
    "stage twice": (lambda p: second(p, name="step"), "another stage has its name"),
    "missing output": (lambda p: replace(p, outputs=("w",)), "output 'w' is not produced by any stage"),
    "input ports": (lambda p: restaged(p, inputs=p.step.inputs[:2]), "one node for each input: 3 nodes, 2 ports"),
    "output ports": (lambda p: restaged(p, outputs=(*p.step.outputs, Port("z", (None,), "float32"))),
                     "one node for each output: 1 nodes, 2 ports"),
    "output shape": (lambda p: restaged(p, outputs=(Port("y", (None, 5, 3), "float32"),)),
                     "output y [B, 5, 3] float32 is float32 (None, 3, 5) in the graph"),
    "output dtype": (lambda p: restaged(p, outputs=(Port("y", (None, 3, 5), "float16"),)),
                     "output y [B, 3, 5] float16 is float32"),
    "order of nodes": (before_use, "the graph is well-formed"),
    "module call": (edited(as_module), "is a call_module: only functions and weights belong in a stage"),
    "no value": (edited(forget_value), "node sin has no shape"),
    "no weight": (edited(lose_weight), "the graph is well-formed: Node"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named(program: Program, name: str) -> None:
    broken, message = BROKEN[name]
    with pytest.raises(StepfoldError) as caught:
        verify(broken(program))
    text = str(caught.value)
    assert message in text
    assert text.startswith("program: " if name == "missing output" else "stage "), text


def test_a_well_formed_program_passes(program: Program, tiny_program: Program) -> None:
    verify(program)
    verify(tiny_program)
    verify(edited(lambda graph: None)(program))
    verify(second(program))


def test_a_table_is_a_source(program: Program) -> None:
    """`t` of every grid call instead of the program input."""
    verify(replace(program, inputs=program.inputs[:1] + program.inputs[2:], tables={"t": np.zeros(4, np.float32)}))


@pytest.mark.parametrize(
    ("rate", "accepted"),
    [
        (Rate.CONST, {Rate.CONST}),
        (Rate.ONCE, {Rate.CONST, Rate.ONCE}),
        (Rate.TIMESTEP, {Rate.CONST, Rate.TIMESTEP}),
        (Rate.ONCE_TIMESTEP, set(Rate) - {Rate.STEP}),
        (Rate.STEP, set(Rate)),
    ],
)
def test_what_a_stage_of_a_rate_may_read(rate: Rate, accepted: set[Rate]) -> None:
    assert {source for source in Rate if source.roles <= rate.roles} == accepted
    assert Rate.of(rate.roles) is rate
