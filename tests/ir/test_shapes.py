"""Shapes with the batch told apart from sizes that look like it."""

import pytest
import torch
from graphs import traced
from programs import component
from torch import fx

from stepfold.ir.edit import output_nodes
from stepfold.ir.shapes import PROBE_BATCHES, example, flat_examples, follows_batch, port, propagate
from stepfold.loop.ports import Port

BATCH = PROBE_BATCHES[0]


def node_of(graph: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in graph.graph.nodes if str(node.target).removeprefix("aten.") == name)


def test_a_size_that_equals_the_probe_batch_is_not_the_batch() -> None:
    """[B, 2] with B = 2: only the first is None."""
    graph = traced(lambda x: x.relu(), torch.randn(2, BATCH, 3)).graph
    assert node_of(graph, "relu.default").meta["shape"] == (None, BATCH, 3)


@pytest.mark.parametrize(
    ("function", "shape", "follows"),
    [
        (lambda x: x.relu(), (None, 3, 4), True),
        (lambda x: x.transpose(0, 1).relu(), (3, None, 4), False),
        (lambda x: x.flatten(0, 1).relu(), (None, 4), False),  # B T rows are not B
        (lambda x: x.mean().relu(), (), False),
        (lambda x: x.mean(dim=0).relu(), (3, 4), False),
        (lambda x: (x.unsqueeze(0) - x.unsqueeze(1)).relu(), (None, None, 3, 4), False),
    ],
)
def test_which_dimension_follows_the_batch(function, shape: tuple, follows: bool) -> None:
    node = node_of(traced(function, torch.randn(2, 3, 4)).graph, "relu.default")
    assert node.meta["shape"] == shape
    assert follows_batch(node) is follows


def test_values_are_of_the_first_probe_batch() -> None:
    graph = traced(lambda x: x.reshape(x.shape[0], 12).relu(), torch.randn(2, 3, 4)).graph
    assert tuple(node_of(graph, "relu.default").meta["val"].shape) == (BATCH, 12)
    assert node_of(graph, "sym_size.int").meta["val"] == BATCH
    assert "shape" not in node_of(graph, "sym_size.int").meta


def test_a_tuple_has_no_shape_and_its_parts_do() -> None:
    stage = component(lambda x: x.split(2, 1)[1].relu(), torch.randn(2, 4)).step
    assert "shape" not in node_of(stage.graph, "split.Tensor").meta
    assert not follows_batch(node_of(stage.graph, "split.Tensor"))
    getitem = next(node for node in stage.graph.graph.nodes if "getitem" in str(node.target))
    assert getitem.meta["shape"] == (None, 2)


def test_propagate_replaces_what_an_edit_left() -> None:
    before = traced(lambda x: x.relu(), torch.randn(2, 4))
    node = node_of(before.graph, "relu.default")
    node.meta["shape"] = (7, 7)
    propagate(before.graph, before.inputs)
    assert node.meta["shape"] == (None, 4)


def test_port_and_example() -> None:
    stage = component(lambda x: x.to(torch.float64), torch.randn(2, 4)).step
    (output,) = output_nodes(stage)
    made = port(output, "y")
    assert made == Port("y", (None, 4), "float64")
    assert example(made).shape == (BATCH, 4) and example(made).dtype == torch.float64
    assert example(made, batch=5).shape == (5, 4)


def test_flat_examples_are_in_port_order() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    ports = (Port("b", (None,), "float32"), Port("a", (None,), "float32"))
    assert [value is wanted for value, wanted in zip(flat_examples(ports, {"a": a, "b": b}), (b, a), strict=True)]
    assert flat_examples(ports, {"a": a, "b": b})[0] is b
