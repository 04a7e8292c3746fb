"""Selections between booleans."""

import pytest
import torch
import zoo
from graphs import traced

from stepfold.frontend.repairs.boolean import BooleanMaskedFill, BooleanWhere
from stepfold.ir.rewriting import Refused

X = torch.randn(2, 5)
WHERE = torch.ops.aten.where.self
FILL = torch.ops.aten.masked_fill.Scalar


@pytest.mark.parametrize("value", [True, False])
def test_masked_fill_of_booleans(value: bool) -> None:
    before = traced(lambda x: (x > 0).masked_fill(x > 0.5, value), X)
    wanted = before()[0]
    assert len(BooleanMaskedFill().apply(before.graph).made) == 1
    before.propagate()
    assert FILL not in {node.target for node in before.graph.graph.nodes}
    assert torch.equal(before()[0], wanted)
    assert len(BooleanMaskedFill().apply(before.graph).made) == 0


def test_masked_fill_of_numbers_is_kept() -> None:
    before = traced(lambda x: x.masked_fill(x > 0, 0.0), X)
    node = next(node for node in before.graph.graph.nodes if node.target is FILL)
    answer = BooleanMaskedFill().match(node)
    assert isinstance(answer, Refused) and answer.reason == "it fills a tensor that is not boolean"


def test_where_between_booleans_broadcasts() -> None:
    before = traced(lambda x: torch.where(x > 0, (x > 1)[:, :1], x < -1), X * 2)
    wanted = before()[0]
    assert len(BooleanWhere().apply(before.graph).made) == 1
    before.propagate()
    assert torch.equal(before()[0], wanted)
    assert len(BooleanWhere().apply(before.graph).made) == 0


def test_where_between_numbers_is_kept() -> None:
    before = traced(lambda x: torch.where(x > 0, x, -x), X)
    node = next(node for node in before.graph.graph.nodes if node.target is WHERE)
    answer = BooleanWhere().match(node)
    assert isinstance(answer, Refused) and answer.reason == "its branches are not boolean"


@pytest.mark.slow
def test_hunyuanvideo_selects_no_booleans(captured) -> None:
    """The real class that needs it: it masks a boolean attention mask."""
    for node in captured(zoo.HUNYUANVIDEO).step.graph.graph.nodes:
        if node.target in (WHERE, FILL):
            assert node.meta["val"].dtype != torch.bool
