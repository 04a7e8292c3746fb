"""Attention masks that stand for every query at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from graphs import traced
from zoo import ZooModel

from stepfold.frontend.repairs.masks import SDPA, ExpandedMask
from stepfold.ir.program import Program
from stepfold.ir.rewriting import Refused

Q = torch.randn(2, 2, 5, 4)
MASK = torch.tensor([[True, True, False], [True, False, True]])[:, None, None]


def attention(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, q[:, :, :3], q[:, :, :3], attn_mask=mask)


def test_the_mask_is_written_out() -> None:
    before = traced(attention, Q, MASK)
    wanted = before()[0]
    assert len(ExpandedMask().apply(before.graph).made) == 1
    before.propagate()
    node = next(node for node in before.graph.graph.nodes if node.target is SDPA)
    mask = node.args[3] if len(node.args) > 3 else node.kwargs["attn_mask"]
    assert mask.meta["shape"] == (None, 1, 5, 3)
    torch.testing.assert_close(before()[0], wanted, rtol=0, atol=0)
    assert len(ExpandedMask().apply(before.graph).made) == 0


def test_reasons() -> None:
    full = traced(attention, Q, MASK.expand(2, 1, 5, 3).contiguous()).graph.graph
    none = traced(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), Q).graph.graph
    reasons = [ExpandedMask().match(node) for graph in (full, none) for node in graph.nodes if node.target is SDPA]
    assert reasons == [Refused("its mask has a row for each query"), Refused("it has no mask")]


@pytest.mark.slow
def test_pixart_masks_have_a_row_for_each_query(captured: Callable[[ZooModel], Program]) -> None:
    """The real class that needs it: its prompt mask stands for every image token."""
    nodes = captured(zoo.PIXART).step.graph.graph.find_nodes(op="call_function", target=SDPA)
    masks = [node.args[3] for node in nodes if len(node.args) > 3 and node.args[3] is not None]
    assert len(masks) == 2 and all(mask.meta["shape"][-2] == 16 for mask in masks)
