"""Complex rotary embeddings in real numbers."""

import torch
import zoo
from graphs import traced

from stepfold.frontend.repairs.complex_rotary import complex_nodes, complex_to_real
from stepfold.frontend.repairs.constants import fold_constants
from stepfold.frontend.repairs.reshape import ViewToReshape
from stepfold.ir.rewriting import Refused

X = torch.randn(2, 3, 8)


class Rotary(torch.nn.Module):
    """The rotary embedding as QwenImage writes it."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
        self.table = torch.polar(torch.ones_like(angles), angles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rotated = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * self.table
        return torch.view_as_real(rotated).flatten(2)


def test_rotation_is_written_out() -> None:
    before = traced(Rotary(), X)
    wanted = before()[0]
    ViewToReshape().apply(before.graph)
    fold_constants(before.graph)
    assert complex_to_real(before.graph) > 0
    before.propagate()
    assert not [n for n in before.graph.graph.nodes if "complex" in str(getattr(n.meta.get("val"), "dtype", ""))]
    assert [name for name in before.calls() if name.startswith(("mul", "sub", "add", "stack"))] == [
        "mul.Tensor",
        "mul.Tensor",
        "sub.Tensor",
        "mul.Tensor",
        "mul.Tensor",
        "add.Tensor",
        "stack.default",
    ]
    torch.testing.assert_close(before()[0], wanted, rtol=1e-6, atol=1e-6)
    assert complex_to_real(before.graph) == 0


def test_a_real_factor_scales_both_parts() -> None:
    before = traced(lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 3, 4, 2)) * x[..., :4]), X)
    wanted = before()[0]
    ViewToReshape().apply(before.graph)
    complex_to_real(before.graph)
    before.propagate()
    torch.testing.assert_close(before()[0], wanted, rtol=1e-6, atol=1e-6)


def test_an_operator_without_real_form_is_named() -> None:
    before = traced(lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 3, 4, 2)).exp()), X)
    ViewToReshape().apply(before.graph)
    answer = complex_nodes(before.graph.graph)
    assert isinstance(answer, Refused) and "aten.exp.default has no form in real numbers" in answer.reason
    calls = before.calls()
    assert complex_to_real(before.graph) == 0 and before.calls() == calls


def test_a_reader_that_is_not_real_is_named() -> None:
    before = traced(lambda x: torch.view_as_complex(x.reshape(-1, 3, 4, 2)).abs(), X)
    ViewToReshape().apply(before.graph)
    answer = complex_nodes(before.graph.graph)
    assert isinstance(answer, Refused) and "aten.abs.default reads a complex value" in answer.reason


def test_qwenimage_has_no_complex_value_left(captured) -> None:
    """The real class that needs it."""
    graph = captured(zoo.QWENIMAGE).step.graph
    assert not [n for n in graph.graph.nodes if "complex" in str(getattr(n.meta.get("val"), "dtype", ""))]
    assert [n for n in graph.graph.nodes if n.target is torch.ops.aten.stack.default]
