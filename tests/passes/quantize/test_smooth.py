"""Exact folds of a scale into whatever writes a value, each to 1e-9 in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from programs import calls, component, operators
from torch import nn

from stepfold.ir.analysis.writers import find_writer
from stepfold.ir.program import Program, Refusal
from stepfold.passes.quantize.layers import Group, Selection, find_groups
from stepfold.passes.quantize.smooth import smooth

EVERYTHING = Selection(("*",), (), 1)
D, HEADS = 8, 2


class Network(nn.Module):
    """Linear layers `before` and `after` something; the last operator keeps `after` from being the last layer."""

    def __init__(self, wide: int = D, between: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.other = nn.Linear(D, wide, dtype=torch.float64), nn.Linear(D, D, dtype=torch.float64)
        self.after = nn.Linear(D, D, dtype=torch.float64)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.between is not None
        return torch.tanh(self.after(self.between(self, x)))


def attention(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (model.other, model.other, model.before)
    )
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def gated(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.before(x) * nn.functional.silu(model.other(x))


def gated_in_one(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    value, gate = model.before(x).chunk(2, dim=-1)
    return value * nn.functional.gelu(gate)


def modulated(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    scale, shift = model.before(x.mean(1, keepdim=True)).chunk(2, dim=-1)
    return nn.functional.layer_norm(x, (D,)) * (1 + scale) + shift


def activated(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(model.before(x))


def read_twice(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    value = gated(model, x)
    return value + 0 * model.after(value)


def split_over_tokens(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Both halves are written by the same outputs: dividing them would divide the gate too."""
    value, gate = model.before(x).chunk(2, dim=1)
    return value * nn.functional.silu(gate)


FOLDS = [
    pytest.param(D, attention, "before", id="F2, into V"),
    pytest.param(D, gated, "before", id="F3, into the linear half"),
    pytest.param(2 * D, gated_in_one, "before", id="F3, into half of the rows"),
    pytest.param(2 * D, modulated, None, id="F1, into a modulation"),
]


def program_of(wide: int, between: Callable[..., torch.Tensor]) -> Program:
    x = torch.randn(2, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return component(Network(wide, between), x)


def group_of(program: Program, name: str = "after") -> Group:
    groups, _ = find_groups(program.step, EVERYTHING, lambda layer: None)
    return next(group for group in groups if group.name == name)


def divided(program: Program, at_run_time: bool = False) -> tuple[Program, torch.Tensor, set[str], list[Refusal]]:
    group = group_of(program)
    scale = torch.exp(torch.linspace(-3, 3, D, dtype=torch.float64))
    after, done, refused = smooth(program, [group], {group.key: scale}, lambda _: at_run_time)
    return after, scale, done, refused


def values_of(program: Program, name: str = "after") -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer reads, and the output of the program."""
    from stepfold.calibration.observe import SiteObserver

    seen: list[torch.Tensor] = []
    observer = SiteObserver(program.step.graph, {group_of(program, name).source: seen.append})
    with torch.no_grad():
        (output,) = observer.run(*program.example.values())
    return seen[0], output


@pytest.mark.parametrize(("wide", "between", "writer"), FOLDS)
def test_the_value_is_divided_and_the_output_stays(wide: int, between: Callable, writer: str | None) -> None:
    program = program_of(wide, between)
    value, output = values_of(program)
    after, scale, done, refused = divided(program)
    smaller, same = values_of(after)
    assert (smaller * scale - value).abs().max() <= 1e-9 * value.abs().max()
    assert (same - output).abs().max() <= 1e-9
    assert done == {group_of(program).key} and not refused
    if writer is not None:
        assert operators(after.step) == operators(program.step), "no operator is added"


@pytest.mark.parametrize(("wide", "between", "writer"), FOLDS[:3])
def test_the_writer_is_found(wide: int, between: Callable, writer: str) -> None:
    found = find_writer(group_of(program_of(wide, between)).source)
    assert found is not None and found.channels.tolist() == list(range(D))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (activated, "smoothing: its input has no exact place for a scale"),
        (split_over_tokens, "smoothing: its input has no exact place for a scale"),
        (read_twice, "smoothing: another operator reads its input"),
    ],
)
def test_what_cannot_be_folded_is_refused_or_multiplied(between: Callable, reason: str) -> None:
    program = program_of(D, between)
    after, _, done, refused = divided(program)
    assert refused == [Refusal("after", reason)] and not done
    assert torch.equal(values_of(after)[1], values_of(program)[1])
    multiplied, scale, done, refused = divided(program, at_run_time=True)
    assert done and not refused
    assert (values_of(multiplied)[1] - values_of(program)[1]).abs().max() <= 1e-9
    assert len(calls(multiplied.step)) == len(calls(program.step)) + 1
    assert (values_of(multiplied)[0] * scale - values_of(program)[0]).abs().max() <= 1e-9


def test_grouped_queries_are_left_alone() -> None:
    def grouped(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q = model.other(x).unflatten(-1, (4, -1)).transpose(1, 2)
        v = model.before(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, v, v, enable_gqa=True).transpose(1, 2).flatten(2)

    assert find_writer(group_of(program_of(4, grouped)).source) is None
