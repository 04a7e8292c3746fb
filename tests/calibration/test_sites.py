"""The values that statistics are taken of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import INNER, TOKENS, WIDTH, standard
from programs import component, context_of

from stepfold.calibration.sites import Watched, watched_values
from stepfold.ir.program import Program
from stepfold.passes.hoist.hoist import Hoist, HoistOptions
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize


def found(program: Program, gram_width: int = 100) -> dict[str, Watched]:
    return {item.entry.name: item for item in watched_values(program, gram_width)}


def layers(item: Watched) -> list[str]:
    return [layer.path for layer in item.entry.layers]


def test_values_of_linear_layers_in_graph_order() -> None:
    program = standard()
    sites = found(program)
    assert {name: (s.entry.width, s.entry.tokens) for name, s in sites.items()} == {
        "first": (WIDTH, TOKENS),
        "second": (INNER, TOKENS),
        "third": (WIDTH, TOKENS),
        "time": (1, 1),
    }
    order = list(program.step.graph.graph.nodes)
    places = [order.index(item.node) for item in watched_values(program, 100)]
    assert places == sorted(places)


class Shared(torch.nn.Module):
    """Two layers read x, one module is called twice, and one layer reads a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.again = (torch.nn.Linear(4, 4) for _ in range(3))
        self.table = torch.nn.Parameter(torch.randn(1, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 6, 4]."""
        return self.again(torch.relu(self.query(x) + self.key(x))) + self.again(x * 2 + 1)


class Pieces(torch.nn.Module):
    """A layer that reads a piece of a split, as those behind joined tokens of two streams do."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 6, 4]."""
        text, image = torch.relu(x).split([2, 4], dim=1)
        return torch.cat([self.text(text), self.image(image)], dim=1)


def test_a_layer_that_reads_a_piece_of_a_split() -> None:
    sites = found(component(Pieces(), torch.randn(2, 6, 4)))
    assert {name: item.entry.tokens for name, item in sites.items()} == {"text": 2, "image": 4}


def test_layers_that_read_one_value_share_it_and_names_are_unique() -> None:
    sites = found(component(Shared(), torch.randn(2, 6, 4)))
    assert {name: layers(item) for name, item in sites.items()} == {
        "query": ["query", "key"],
        "again": ["again"],
        "again#2": ["again"],
    }


def test_wide_values_get_no_gram_matrix() -> None:
    sites = found(standard(), gram_width=WIDTH)
    assert {name: item.entry.gram for name, item in sites.items()} == {
        "first": True,
        "third": True,
        "time": True,
        "second": False,
    }


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_quantized_layers_are_traced_to_the_float_value(tmp_path: Path, activations: Any) -> None:
    program = standard()
    options = QuantizeOptions(activations=activations, min_tokens=1)
    quantized = Quantize(options).run(program, context_of(program, tmp_path)).program
    before, after = found(program), found(quantized)
    assert [layers(item) for item in after.values()] == [layers(item) for item in before.values()]
    assert [item.entry.value for item in after.values()] == [item.entry.value for item in before.values()]


def test_hoisted_layers_leave_the_step(tmp_path: Path) -> None:
    program = standard()
    hoisted = Hoist(HoistOptions()).run(program, context_of(program, tmp_path)).program
    assert set(found(hoisted)) == {"first", "second", "third"}
    before = found(program)
    for name, item in found(hoisted).items():
        assert item.entry.layers == before[name].entry.layers


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        ((4, TOKENS, WIDTH), lambda x: x),
        ((4, TOKENS, WIDTH), lambda x: x.transpose(0, 1)),  # tokens first
        ((4, TOKENS, WIDTH), lambda x: x.reshape(-1, WIDTH)),  # tokens in the batch
    ],
)
def test_rows_are_told_apart_by_sample(shape: tuple[int, ...], value: Any) -> None:
    layer = torch.nn.Linear(WIDTH, 2)
    program = component(lambda x: layer(value(torch.tanh(x))), torch.randn(2, *shape[1:]))
    (item,) = found(program).values()
    x = torch.randn(shape)
    torch.testing.assert_close(item.by_row(value(x), shape[0]), x)
    assert item.entry.tokens == TOKENS


def test_a_value_without_a_batch_is_one_row() -> None:
    layer = torch.nn.Linear(4, 4)
    program = component(lambda x, table: x + layer(table), torch.randn(2, 6, 4), torch.randn(6, 4))
    (item,) = found(program).values()
    assert item.entry.tokens == 6
    assert item.by_row(torch.zeros(6, 4), 8).shape == (1, 6, 4)


def test_half_precision_is_widened() -> None:
    (item,) = found(component(torch.nn.Linear(4, 2), torch.randn(2, 3, 4))).values()
    assert item.by_row(torch.ones(2, 3, 4, dtype=torch.float16), 2).dtype == torch.float32
