"""Writes into tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from graphs import traced
from zoo import ZooModel

from stepfold.frontend.repairs.no_ops import NoOp
from stepfold.frontend.repairs.writes import FunctionalCopy, InterleavedWrite
from stepfold.ir.program import Program
from stepfold.ir.rewriting import Refused

X = torch.randn(2, 3, 6)


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """Every second element is negated."""
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2]
    out[..., 1::2] = -x[..., 1::2]
    return out


def test_interleaved_writes_become_a_stack() -> None:
    before = traced(interleaved, X)
    NoOp().apply(before.graph)
    assert len(FunctionalCopy().apply(before.graph).made) == 2
    assert len(InterleavedWrite().apply(before.graph).made) == 1
    before.graph.graph.eliminate_dead_code()
    before.propagate()
    assert before.calls() == ["slice.Tensor", "slice.Tensor", "neg.default", "stack.default", "flatten.using_ints"]
    x = torch.randn(3, 3, 6)
    torch.testing.assert_close(before(x)[0], interleaved(x), rtol=0, atol=0)
    assert len(InterleavedWrite().apply(before.graph).made) == 0


def one_half(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[..., 0::2] = 1 - x[..., 0::2]
    return out


def other_stride(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[..., 0::2] = 1 - x[..., 0::2]
    out[..., 1::3] = 2 - x[..., 1::3]
    return out


def limited(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[..., 0:4:2] = 1 - x[..., 0:4:2]
    out[..., 1:4:2] = 2 - x[..., 1:4:2]
    return out


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (one_half, "it does not follow another write"),
        (other_stride, "the two writes do not alternate"),
        (limited, "the two writes do not alternate"),
    ],
)
def test_other_writes_are_kept(function: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    before = traced(function, X)
    writes = [node for node in before.graph.graph.nodes if node.target is torch.ops.aten.slice_scatter.default]
    answer = InterleavedWrite().match(writes[-1])
    assert isinstance(answer, Refused) and answer.reason == reason


def fill(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[:, 0] = x[:, 1].double()
    return out[:, 0]


def test_a_casting_copy_is_kept() -> None:
    before = traced(fill, X)
    node = next(node for node in before.graph.graph.nodes if node.target is torch.ops.aten.copy.default)
    answer = FunctionalCopy().match(node)
    assert isinstance(answer, Refused) and answer.reason == "it changes the dtype"


@pytest.mark.slow
def test_wan_scatters_nothing(captured: Callable[[ZooModel], Program]) -> None:
    """The real class that needs it."""
    targets = {str(node.target) for node in captured(zoo.WAN).step.graph.graph.nodes}
    assert not [target for target in targets if "scatter" in target or "copy" in target]
