"""One rewrite: what is replaced, what is refused and where, and what a new node is told about the old one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from graphs import traced
from torch import fx

from stepfold.ir.rewriting import Refused, Rewrite, call, two

aten = torch.ops.aten
X = torch.randn(2, 5)


class Double(Rewrite[fx.Node]):
    """x + x -> x * 2, of what is a sine."""

    name: ClassVar[str] = "double"
    roots: ClassVar[Collection[Any]] = (aten.add.Tensor,)

    def match(self, node: fx.Node) -> fx.Node | Refused | None:
        for left, right in two(node, aten.add.Tensor)[:1]:
            if left is right:
                return left if left.target is aten.sin.default else Refused("it is no sine", left)
        return None

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: fx.Node) -> fx.Node:
        return graph.graph.call_function(aten.mul.Tensor, (match, 2))


class Same(Rewrite[fx.Node]):
    """abs(x) -> x: a replacement that is there already."""

    name: ClassVar[str] = "same"
    roots: ClassVar[Collection[Any]] = (aten.abs.default,)

    def match(self, node: fx.Node) -> fx.Node:
        return node.args[0]  # type: ignore[return-value]

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: fx.Node) -> fx.Node:
        return match


def function(x: torch.Tensor) -> torch.Tensor:
    wave, bend = x.sin(), x.cos()
    return (wave + wave) * (bend + bend) + (wave + bend)


def test_matches_are_replaced_and_near_ones_are_named() -> None:
    before = traced(function, X)
    wanted, calls = before()[0], before.calls()
    (sum_of_sines,) = (n for n in before.graph.graph.nodes if n.target is aten.add.Tensor and Double().match(n))
    shape = sum_of_sines.meta["shape"]
    applied = Double().apply(before.graph)
    (new,) = applied.made
    ((node, refused),) = applied.refused
    assert new.meta["shape"] == shape and refused.at is not None
    assert (node.target, refused.reason, refused.at.target) == (aten.add.Tensor, "it is no sine", aten.cos.default)
    assert before.calls() == [*calls[:2], "mul.Tensor", *calls[3:]]
    before.propagate()
    torch.testing.assert_close(before()[0], wanted)
    assert Double().apply(before.graph).made == ()


def test_a_pattern_begins_where_it_is_refused_too() -> None:
    assert Double().begins(traced(lambda x: x.cos() + x.cos().neg(), X).graph) is False
    assert Double().begins(traced(lambda x: x.mean() + x.mean(), X).graph) is False
    assert Double().begins(traced(function, X).graph) is True


def test_a_node_that_was_there_keeps_what_is_known_of_it() -> None:
    before = traced(lambda x: x.sin().abs() * 2, X)
    sine = next(node for node in before.graph.graph.nodes if node.target is aten.sin.default)
    known = dict(sine.meta)
    assert Same().apply(before.graph).made == (sine,) and sine.meta == known
    assert before.calls() == ["sin.default", "mul.Tensor"]


def test_two_takes_values_in_both_orders_and_no_numbers() -> None:
    before = traced(lambda x: (x.sin() + x.cos()) + 1, X)
    first, second = (node for node in before.graph.graph.nodes if node.target is aten.add.Tensor)
    orders = [[value.target for value in pair] for pair in two(first, aten.add.Tensor)]
    assert orders == [[aten.sin.default, aten.cos.default], [aten.cos.default, aten.sin.default]]
    assert two(second, aten.add.Tensor) == two(first, aten.mul.Tensor) == []


def test_a_call_knows_its_shape_and_where_it_came_from() -> None:
    before = traced(lambda x: x.sin(), X)
    sine = next(node for node in before.graph.graph.nodes if node.target is aten.sin.default)
    sine.meta["stack_trace"] = "here"
    with before.graph.graph.inserting_before(sine):
        wide = call(before.graph, sine, aten.unsqueeze.default, sine.args[0], 0)
        same = call(before.graph, sine, aten.neg.default, sine.args[0])
    assert wide.meta["val"].shape == (1, *X.shape) and "shape" not in wide.meta
    assert same.meta["shape"] == sine.meta["shape"] and same.meta["stack_trace"] == "here"
