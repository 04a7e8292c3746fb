"""The smallest failing part of ONNX graphs, judged by functions in the place of an engine."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from stepfold.backends.onnx.reduce import reduce


def chain(operators: list[str]) -> onnx.ModelProto:
    """x [2] through one-input operators; every third also adds a weight."""
    nodes, weights, last = [], [], "x"
    for i, name in enumerate(operators):
        inputs = [last]
        if name == "Add":
            weights.append(helper.make_tensor(f"w{i}", TensorProto.FLOAT, [2], [1.0, 2.0]))
            inputs.append(f"w{i}")
        nodes.append(helper.make_node(name, inputs, [f"v{i}"], name=f"n{i}"))
        last = f"v{i}"
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "chain", [value("x", TensorProto.FLOAT, [2])], [value(last, TensorProto.FLOAT, [2])], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@given(
    st.lists(st.sampled_from(["Relu", "Add", "Neg"]), max_size=12),
    st.lists(st.sampled_from(["Relu", "Add"]), max_size=12),
)
def test_one_bad_node_is_found_among_any_others(before: list[str], after: list[str]) -> None:
    part = reduce(chain([*before, "Sin", *after]), lambda model: "Sin" in kinds(model))
    assert kinds(part) == ["Sin"]
    onnx.checker.check_model(part)
    assert len(part.graph.input) == len(part.graph.output) == 1


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_two_nodes_that_fail_together_stay_together(before: int, between: int, after: int) -> None:
    model = chain(["Relu"] * before + ["Sin"] + ["Add"] * between + ["Cos"] + ["Relu"] * after)
    part = reduce(model, lambda model: {"Sin", "Cos"} <= set(kinds(model)))
    assert kinds(part) == ["Sin", *["Add"] * between, "Cos"]
    assert len(part.graph.initializer) == between
    onnx.checker.check_model(part)


def test_branches_that_do_not_matter_are_left_out() -> None:
    model = chain(["Relu", "Sin", "Relu"])
    model.graph.node.insert(1, helper.make_node("Neg", ["x"], ["side"], name="side"))
    model.graph.output.append(helper.make_tensor_value_info("side", TensorProto.FLOAT, [2]))
    assert kinds(reduce(model, lambda model: "Sin" in kinds(model))) == ["Sin"]


def test_a_failure_of_the_whole_only_gives_the_whole() -> None:
    model = chain(["Relu", "Neg", "Abs"])
    assert kinds(reduce(model, lambda part: len(part.graph.node) == 3)) == ["Relu", "Neg", "Abs"]


def test_values_of_unknown_type_are_no_inputs() -> None:
    """Behind an operator that ONNX does not know nothing has a type, so nothing can be cut there."""
    model = chain(["Relu", "Sin", "Cos"])
    model.graph.node[1].domain = "unknown"
    model.opset_import.append(helper.make_opsetid("unknown", 1))
    part = reduce(model, lambda part: "Cos" in kinds(part))
    assert kinds(part) == ["Sin", "Cos"]


@pytest.mark.parametrize("branch", ["then_branch", "else_branch"])
def test_what_a_subgraph_reads_is_kept(branch: str) -> None:
    value = helper.make_tensor_value_info
    inner = helper.make_graph(
        [helper.make_node("Sin", ["v0"], ["r"])], "inner", [], [value("r", TensorProto.FLOAT, [2])]
    )
    other = helper.make_graph(
        [helper.make_node("Cos", ["v0"], ["r"])], "inner", [], [value("r", TensorProto.FLOAT, [2])]
    )
    model = chain(["Relu", "Neg"])
    model.graph.input.append(value("c", TensorProto.BOOL, []))
    branches = {"then_branch": other, "else_branch": other, branch: inner}
    model.graph.node.append(helper.make_node("If", ["c"], ["y"], name="if", **branches))
    model.graph.output[0].CopyFrom(value("y", TensorProto.FLOAT, [2]))
    part = reduce(model, lambda part: "If" in kinds(part))
    assert kinds(part) == ["If"] and {item.name for item in part.graph.input} == {"c", "v0"}
