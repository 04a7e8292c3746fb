"""Constant folding."""

import pytest
import torch
import zoo
from graphs import Traced, traced

from stepfold.frontend.repairs import constants, repair
from stepfold.frontend.repairs.constants import fold_constants, share_equal_weights

X = torch.randn(2, 4)


def folded(before: Traced) -> int:
    count = fold_constants(before.graph)
    before.propagate()
    return count


def buffers(before: Traced) -> list[str]:
    return sorted({str(node.target) for node in before.graph.graph.find_nodes(op="get_attr")})


def test_a_frequency_table_is_computed_once() -> None:
    before = traced(lambda x: x * torch.exp(torch.arange(4) * -0.5), X)
    wanted = before()[0]
    assert folded(before) == 1
    assert before.calls() == ["mul.Tensor"] and buffers(before) == ["folded_exp"]
    torch.testing.assert_close(before()[0], wanted, rtol=0, atol=0)
    assert folded(before) == 0


def test_equal_results_share_a_buffer() -> None:
    before = traced(lambda x: x * torch.arange(4).exp() + torch.arange(4).exp(), X)
    assert folded(before) == 2
    assert len(buffers(before)) == 1


def test_float64_tables_keep_their_precision() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(4, dtype=torch.float64) * 1e6 / 3
        return x * angle.cos().float()

    before = traced(function, X)
    assert folded(before) == 1
    wanted = (torch.arange(4, dtype=torch.float64) * 1e6 / 3).cos().float()
    torch.testing.assert_close(getattr(before.graph, buffers(before)[0]), wanted, rtol=0, atol=0)


class Weighted(torch.nn.Module):
    """Reads a weight through an expression."""

    def __init__(self, expression, *shape: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(*shape))
        self.expression = expression

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expression(x, self.weight)


def test_a_rearranged_weight_keeps_its_name() -> None:
    before = traced(Weighted(lambda x, w: x @ w.t() + w.unsqueeze(0)[0, :, 0], 4, 4), X)
    assert folded(before) == 0
    assert buffers(before) == ["weight"]


def test_a_part_of_a_weight_is_cut() -> None:
    """A position embedding of which a crop is read: SD3 stores 192 x 192 positions."""
    before = traced(Weighted(lambda x, w: x + w.reshape(1, 8, 4)[:, 2:3].squeeze(1), 8, 4), X)
    wanted = before()[0]
    assert folded(before) == 1
    assert before.calls() == ["add.Tensor"]
    torch.testing.assert_close(before()[0], wanted, rtol=0, atol=0)


def test_results_beyond_the_limit_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "FOLD_BYTES", 64)
    before = traced(lambda x: x @ torch.outer(torch.arange(4).exp(), torch.arange(64).exp()), X)
    assert folded(before) == 1  # the small factor; the product [4, 64] and the large factor exceed 64 bytes
    assert "outer.default" in before.calls() or "mul.Tensor" in before.calls()


def test_expansions_and_fills_are_not_stored() -> None:
    before = traced(lambda x: x + torch.arange(4).exp().expand(2000, 4)[0] * torch.full((4,), 2.0), X)
    folded(before)
    assert all(getattr(before.graph, name).numel() == 4 for name in buffers(before))
    before = traced(lambda x: x + torch.zeros(4), X)
    assert folded(before) == 0


def test_random_numbers_are_not_constant() -> None:
    before = traced(lambda x: x + torch.rand(4), X)
    assert folded(before) == 0


def test_what_reads_the_batch_is_not_constant() -> None:
    before = traced(lambda x: x + torch.arange(x.shape[0])[:, None], X)
    folded(before)
    torch.testing.assert_close(before(torch.zeros(3, 4))[0][:, 0], torch.arange(3.0))


def test_tied_weights_are_read_under_one_name() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(4, 4, bias=False)
            self.second = torch.nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    before = traced(Tied(), X)
    share_equal_weights(before.graph)
    before.propagate()
    assert len(buffers(before)) == 1
    assert share_equal_weights(before.graph) == 0


@pytest.mark.slow
def test_rotary_tables_of_flux_leave_no_float64(captured) -> None:
    """The real class that needs it: FLUX computes its rotary tables in float64, in the graph."""
    graph = captured(zoo.FLUX).step.graph
    assert not [n for n in graph.graph.nodes if getattr(n.meta.get("val"), "dtype", None) == torch.float64]
    assert sum(repair(graph, captured(zoo.FLUX).step.inputs).values()) == 0
