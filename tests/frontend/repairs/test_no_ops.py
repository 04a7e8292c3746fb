"""Nodes that return what they receive."""

import pytest
import torch
import zoo
from graphs import traced

from stepfold.frontend.repairs.no_ops import NoOp
from stepfold.frontend.repairs.reshape import ViewToReshape
from stepfold.frontend.repairs.squeeze import NoOpSqueeze
from stepfold.ir.rewriting import Refused

aten = torch.ops.aten
X = torch.randn(2, 3, 4)

NO_OPS = {
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "detach": lambda x: x.detach(),
    "same_dtype": lambda x: x.to(torch.float32),
    "expand": lambda x: x.expand(x.shape[0], 3, 4),
    "reshape": lambda x: x.reshape(-1, 3, 4),
    "full_slice": lambda x: x[:, 0:3],
    "batch_slice": lambda x: x[:],
    "permute": lambda x: x.permute(0, 1, -1),
    "times_one": lambda x: x * 1.0,
    "over_one": lambda x: x / 1,
    "plus_zero": lambda x: x + 0,
    "minus_zero": lambda x: x - 0.0,
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.5, training=False),
    "pad": lambda x: torch.nn.functional.pad(x, (0, 0)),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_removed(name: str) -> None:
    before = traced(lambda x: NO_OPS[name](x).relu(), X)
    NoOp().apply(before.graph)
    before.propagate()
    assert before.calls() == ["relu.default"]
    torch.testing.assert_close(before()[0], X.relu(), rtol=0, atol=0)
    assert len(NoOp().apply(before.graph).made) == 0


KEPT = {
    "cast": (lambda x: x.to(torch.float64), "it changes the dtype"),
    "shorter": (lambda x: x[:, 1:], "it changes the shape"),
    "transposed": (lambda x: x.permute(0, 2, 1).permute(0, 2, 1).permute(0, 2, 1), "it changes the shape"),
    "swapped": (lambda x: x[:, :, :3].permute(0, 2, 1), "it reorders dimensions"),
    "batch_limit": (lambda x: x[:5], "its end is a number along the batch"),
    "doubled": (lambda x: x * 2, "its second argument is not 1"),
    "product": (lambda x: x * x, "its second argument is not 1"),
    "sum": (lambda x: x + x, "its second argument is not 0"),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_reason(name: str) -> None:
    function, reason = KEPT[name]
    before = traced(lambda x: function(x).relu(), X)
    reasons = []
    for node in before.graph.graph.nodes:
        if node.target in NoOp.roots:
            answer = NoOp().match(node)
            reasons += [answer.reason] if isinstance(answer, Refused) else []
    assert reason in reasons


def test_batch_limit_holds_for_larger_batches() -> None:
    """x[:5] is the full range at both probe batches, and yet no no-op."""
    before = traced(lambda x: x[:5] * 2, X)
    NoOp().apply(before.graph)
    before.graph.recompile()
    assert before(torch.ones(7, 3, 4))[0].shape == (5, 3, 4)


def test_squeeze_of_a_larger_dimension() -> None:
    before = traced(lambda x: x.squeeze(1).relu(), X)
    assert len(NoOpSqueeze().apply(before.graph).made) == 1
    before.propagate()
    assert before.calls() == ["relu.default"]
    assert len(NoOpSqueeze().apply(before.graph).made) == 0


def test_squeeze_of_a_unit_dimension_is_kept() -> None:
    before = traced(lambda x: x[:, :1].squeeze(1), X)
    squeeze = next(node for node in before.graph.graph.nodes if "squeeze" in str(node.target))
    answer = NoOpSqueeze().match(squeeze)
    assert isinstance(answer, Refused) and answer.reason == "it removes a dimension of size 1"


@pytest.mark.slow
def test_pixart_has_squeezes_that_do_nothing() -> None:
    """The real class that needs it: its modulation is squeezed along the width."""
    model = zoo.PIXART.build()
    tensors = zoo.PIXART.kwargs(2)
    added = tensors.pop("added_cond_kwargs")

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask):
            return self.inner(
                hidden_states,
                encoder_hidden_states,
                timestep,
                encoder_attention_mask=encoder_attention_mask,
                added_cond_kwargs=added,
                return_dict=False,
            )

    before = traced(
        Call(), *(tensors[n] for n in ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"))
    )
    wanted = before()[0]
    assert NoOpSqueeze().apply(before.graph).made
    before.propagate()
    torch.testing.assert_close(before()[0], wanted, rtol=0, atol=0)


def test_views_become_reshapes() -> None:
    before = traced(lambda x: x.transpose(1, 2).contiguous().view(x.shape[0], 12).relu(), X)
    assert len(ViewToReshape().apply(before.graph).made) == 1
    NoOp().apply(before.graph)
    before.propagate()
    assert before.calls() == ["transpose.int", "reshape.default", "relu.default"]
    torch.testing.assert_close(before()[0], X.transpose(1, 2).reshape(2, 12).relu(), rtol=0, atol=0)
