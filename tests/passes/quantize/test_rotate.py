"""Fold F5: the channels of each head rotated, to 1e-10 in float64, and used where it helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import component, context_of, operators
from torch import nn

from stepfold.ir.analysis.writers import find_heads
from stepfold.ir.program import Program
from stepfold.passes.base import PassResult
from stepfold.passes.quantize.algebra.errors import drift
from stepfold.passes.quantize.algebra.grids import IntegerGrid
from stepfold.passes.quantize.algebra.rotations import rotation
from stepfold.passes.quantize.layers import Group, Selection, find_groups
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize
from stepfold.passes.quantize.rotate import Rotation, rotate

D, HEADS = 24, 3
Between = Callable[["Attention", torch.Tensor], torch.Tensor]


class Attention(nn.Module):
    """Attention with an output projection, and something behind it."""

    def __init__(self, between: Between, dtype: torch.dtype = torch.float64, width: int = D, biased: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(width, 3 * width, dtype=dtype, bias=biased)
        self.wide = nn.Linear(width, 2 * width, dtype=dtype)
        self.out = nn.Linear(width, width, dtype=dtype)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return torch.tanh(self.out(self.between(self, x)))


def attended(model: Attention, x: torch.Tensor) -> torch.Tensor:
    """One projection of query, key and value, cut afterwards."""
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in model.qkv(x).chunk(3, -1))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads_reversed(model: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in model.qkv(x).chunk(3, -1))
    y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return y.permute(0, 1, 3, 2).flatten(2)  # channels of the heads in turn


def gated(model: Attention, x: torch.Tensor) -> torch.Tensor:
    return attended(model, x) * torch.sigmoid(x)


def gated_values(model: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = model.qkv(x).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v * torch.sigmoid(x)))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def grouped(model: Attention, x: torch.Tensor) -> torch.Tensor:
    q = model.qkv(x)[..., :D].unflatten(-1, (HEADS, -1)).transpose(1, 2)
    v = model.out(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)[:, :1].expand(-1, HEADS, -1, -1)
    return nn.functional.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2)


def no_attention(model: Attention, x: torch.Tensor) -> torch.Tensor:
    return model.qkv(x)[..., :D]


def read_twice(model: Attention, x: torch.Tensor) -> torch.Tensor:
    value = attended(model, x)
    return value + 0 * model.out(value)


def program_of(between: Between, biased: bool = True) -> Program:
    x = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return component(Attention(between, biased=biased), x)


def group_of(program: Program, name: str = "out") -> Group:
    groups, _ = find_groups(program.step, Selection(("*",), (), 1), lambda layer: None)
    return [group for group in groups if group.name == name][-1]


def rotated(program: Program, seed: int = 0) -> Program:
    group = group_of(program)
    heads = find_heads(group.source)
    assert heads is not None
    found = Rotation(heads, rotation(heads.columns.shape[1], seed), 1.0, 0.0)
    return rotate(program, [group], {group.key: found})


def output(program: Program) -> torch.Tensor:
    with torch.no_grad():
        (value,) = program.step.graph(*program.example.values())
    return value


# -- the fold


@pytest.mark.parametrize("between", [attended, heads_reversed])
@pytest.mark.parametrize("biased", [True, False])
def test_the_output_stays(between: Between, biased: bool) -> None:
    program = program_of(between, biased)
    after = rotated(program)
    assert (output(after) - output(program)).abs().max() <= 1e-10
    assert operators(after.step) == operators(program.step), "no operator is added"
    before, weight = (group_of(p).weight for p in (program, after))
    assert (before - weight).abs().max() > 0.1
    torch.testing.assert_close(before.norm(dim=1), weight.norm(dim=1))  # rows are rotated, not scaled


def test_query_and_key_are_left_alone() -> None:
    before, after = (group_of(p, "qkv").weight for p in (program_of(attended), rotated(program_of(attended))))
    assert torch.equal(before[: 2 * D], after[: 2 * D]) and not torch.equal(before[2 * D :], after[2 * D :])


def test_heads_are_found_where_they_lie() -> None:
    plain, turned = (find_heads(group_of(program_of(between)).source) for between in (attended, heads_reversed))
    assert plain is not None and turned is not None
    assert plain.rows.tolist() == turned.rows.tolist() == [[2 * D + 8 * h + k for k in range(8)] for h in range(HEADS)]
    assert plain.columns.tolist() == [[8 * h + k for k in range(8)] for h in range(HEADS)]
    assert turned.columns.tolist() == [[h + HEADS * k for k in range(8)] for h in range(HEADS)]


@pytest.mark.parametrize("between", [gated, gated_values, grouped, no_attention])
def test_anything_else_between_is_left_alone(between: Between) -> None:
    assert find_heads(group_of(program_of(between)).source) is None


@pytest.mark.parametrize("size", [1, 2, 8, 12, 72])
def test_rotations_are_orthogonal_and_follow_their_seed(size: int) -> None:
    matrix = rotation(size, 3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, rotation(size, 3))
    if size > 2:
        assert not torch.equal(matrix, rotation(size, 4))
    if size in (2, 8):
        torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))


# -- in int4


def attention_with(change: Callable[[torch.Tensor], None]) -> Program:
    """Attention in float32 with three heads of 32 whose output projection is changed."""
    model = Attention(attended, torch.float32, 32 * HEADS)
    with torch.no_grad():
        change(model.out.weight)
    return component(model, torch.randn(16, 32, 32 * HEADS, generator=torch.Generator().manual_seed(1)))


def quantized(program: Program, cache: Path, **options: object) -> PassResult:
    operation = Quantize(
        QuantizeOptions.model_validate({"scheme": "int4", "group": 32, "include": ("out",), **options})
    )
    return operation.run(program, context_of(program, cache))


def loud_columns(weight: torch.Tensor) -> None:
    weight[:, ::11] *= 20


def on_the_grid(weight: torch.Tensor) -> None:
    weight.copy_(IntegerGrid(4, 32).nearest(weight))


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "sequential-gptq"])
def test_it_is_used_where_the_error_falls(tmp_path: Path, rounding: str) -> None:
    program = attention_with(loud_columns)
    turned, plain = (quantized(program, tmp_path, rounding=rounding, rotate=rotate) for rotate in ("heads", None))
    before, after = turned.details["rotated"]["out"]
    assert 0 < after < 0.9 * before
    errors = [drift(output(result.program), output(program)) for result in (turned, plain)]
    assert errors[0] < errors[1]


def test_it_is_not_used_where_it_does_not_help(tmp_path: Path) -> None:
    program = attention_with(on_the_grid)
    turned, plain = (quantized(program, tmp_path, rounding="gptq", rotate=rotate) for rotate in ("heads", None))
    before, after = turned.details["rotated"]["out"]
    assert before < after
    assert torch.equal(output(turned.program), output(plain.program))


def test_a_value_that_others_read_is_not_tried(tmp_path: Path) -> None:
    x = torch.randn(16, 32, D * 4, generator=torch.Generator().manual_seed(1))
    program = component(Attention(read_twice, torch.float32, D * 4), x)
    assert "rotated" not in quantized(program, tmp_path, rotate="heads").details
