"""What hoisting does to models of other kinds: without conditions, with parts, transposed, of whole timesteps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hoisting import assert_same_samples, by_rate, hoist
from programs import (
    denoiser,
    operators,
)

from stepfold.ir.program import Refusal
from stepfold.loop.ports import Rate
from stepfold.loop.recurrence import Recurrence


def test_a_model_without_conditions() -> None:
    layer = torch.nn.Linear(1, 3)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x) * self.layer(t[:, None] / 1000)

    program = denoiser(Plain(), torch.randn(2, 3), torch.full((2,), 5.0))
    result = hoist(program).program
    assert by_rate(result) == {Rate.STEP: ["tanh.default", "mul.Tensor"]}
    assert [table.shape for table in result.tables.values()] == [(4, 3)]
    assert result.parameters() == 0
    assert_same_samples(program, result)


def test_a_value_whose_first_dimension_is_not_the_batch_stays() -> None:
    """The mean over the batch of t and c couples the rows: it is refused, and the samples are the same."""

    def f(x, t, c):
        mixed = torch.sin(t / 100) + torch.cos(c * 1.0)
        return x * mixed[:, None] + mixed.mean()

    program = denoiser(f, torch.randn(2, 3), torch.full((2,), 5.0), torch.arange(2), guided=False)
    result = hoist(program)
    assert result.refused == (Refusal("mean", "its first dimension is not the batch: []"),)
    assert "mean.default" in operators(result.program.step)
    assert "sin.default" not in operators(result.program.step)
    assert_same_samples(program, result.program)


def test_a_transposed_value_is_hoisted_up_to_where_the_batch_is_first() -> None:
    def f(x, t, c):
        table = torch.stack([torch.sin(t / 100), torch.cos(t / 100)])  # [2, B]
        return x * table[0][:, None] + table[1][:, None] + c[:, None]

    program = denoiser(f, torch.randn(2, 3), torch.full((2,), 5.0), torch.arange(2), guided=False)
    result = hoist(program)
    assert not {"sin.default", "cos.default"} & set(operators(result.program.step))
    assert_same_samples(program, result.program)


def test_parts_of_a_split_are_hoisted() -> None:
    """A tuple has no shape of its own; its parts do."""

    def f(x, t, c):
        scale, shift = torch.stack([t / 1000, c + t / 500], 1).split(1, 1)
        return x * scale + shift

    program = denoiser(f, torch.randn(2, 3), torch.full((2,), 5.0), torch.arange(2), guided=False)
    result = hoist(program)
    assert operators(result.program.step) == ["mul.Tensor", "add.Tensor"]
    assert result.refused == ()
    assert_same_samples(program, result.program)


def test_the_batch_size_alone_is_no_value() -> None:
    """Shapes read from the latent are read from another input in the new stage."""

    def f(x, t, c):
        gain = torch.sin(t / 100).reshape(x.shape[0], 1, 1).expand(x.shape[0], 3, 1)
        return x * gain.reshape(x.shape[0], 3) + c[:, None]

    program = denoiser(f, torch.randn(2, 3), torch.full((2,), 5.0), torch.arange(2), guided=False)
    result = hoist(program).program
    assert "sin.default" not in operators(result.step)
    assert_same_samples(program, result)


def test_integer_timesteps_are_rounded_before_they_are_tabulated() -> None:
    """A grid of 979.99997 is the timestep 980."""

    class Indexed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.arange(1000, dtype=torch.float32)[:, None])

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x + torch.nn.functional.embedding(t, self.table)

    program = denoiser(Indexed(), torch.randn(2, 3), torch.tensor([5, 5]))
    grid = np.array([979.99997, 500.0, 250.00002, 0.4])
    ones = np.ones(4)
    program = replace(program, recurrence=Recurrence(grid, ones, ones, -np.eye(4) / 4, 1.0))
    (values,) = hoist(program).program.tables.values()
    assert values.ravel().tolist() == [980, 500, 250, 0]
