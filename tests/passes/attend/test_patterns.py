"""Which blocks of keys each pattern keeps."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepfold.loop.errors import UsageError
from stepfold.passes.attend.patterns import PATTERNS
from stepfold.passes.attend.patterns.pattern import Place
from stepfold.passes.attend.patterns.window import windows
from stepfold.passes.attend.tiles import Tiles, fitting_tile


def place(grid: tuple[int, int, int], tile: tuple[int, int, int], keep: float, heads: int = 2) -> Place:
    tiles = Tiles(grid, tile)
    generator = torch.Generator().manual_seed(0)
    masses = torch.rand(heads, tiles.number, tiles.number, generator=generator)
    return Place(tiles, keep, lambda: masses)


def rows(kept: torch.Tensor) -> list[set[int]]:
    """The blocks of each block of queries, of the first group of heads."""
    return [set(row) for row in kept[0].tolist()]


@st.composite
def grids(draw: st.DrawFn) -> Tiles:
    tile = tuple(draw(st.integers(1, 3)) for _ in range(3))
    counts = tuple(draw(st.integers(1, 4)) for _ in range(3))
    return Tiles(tuple(t * c for t, c in zip(tile, counts, strict=True)), tile)  # type: ignore[arg-type]


# -- tiles


@given(grids())
def test_the_order_goes_through_tiles_one_after_the_other(tiles: Tiles) -> None:
    order = tiles.order()
    assert sorted(order.tolist()) == list(range(prod(tiles.grid)))
    (_, height, width), (f, y, x) = tiles.grid, tiles.tile
    for number, (F, h, w) in enumerate(tiles.places().tolist()):
        tokens = order[number * tiles.block : (number + 1) * tiles.block].tolist()
        corner = (F * f * height + h * y) * width + w * x
        assert tokens == [corner + (a * height + b) * width + c for a in range(f) for b in range(y) for c in range(x)]


@pytest.mark.parametrize(
    ("grid", "tile"),
    [
        ((1, 64, 64), (1, 8, 8)),
        ((1, 16, 16), (1, 8, 8)),
        ((1, 30, 52), (1, 6, 13)),
        ((4, 16, 16), (1, 8, 8)),
        ((1, 7, 13), None),
    ],
)
def test_the_tile_that_fits(grid: tuple[int, int, int], tile: tuple[int, int, int] | None) -> None:
    found = fitting_tile(grid)
    if tile is None:
        assert found is None
    else:
        assert found is not None and all(size % part == 0 for size, part in zip(grid, found, strict=True))
        assert prod(found) == pytest.approx(prod(tile), rel=0.3)


# -- patterns


@given(grids(), st.data())
def test_a_window_is_that_of_its_formula(tiles: Tiles, data: st.DataObject) -> None:
    """|c - key| along each axis, with a centre that is kept away from the borders (STA, section 3), for odd windows."""
    sizes = tuple(data.draw(st.sampled_from([k for k in range(1, count + 1, 2)])) for count in tiles.counts)
    kept = windows(tiles, sizes)
    places = tiles.places().tolist()
    for query, row in zip(places, kept.tolist(), strict=True):
        centre = [min(max(q, k // 2), n - 1 - k // 2) for q, k, n in zip(query, sizes, tiles.counts, strict=True)]
        near = [all(abs(c - p) <= k // 2 for c, p, k in zip(centre, key, sizes, strict=True)) for key in places]
        assert sorted(row) == [number for number, inside in enumerate(near) if inside]


@pytest.mark.parametrize("name", ["window", "bank"])
@pytest.mark.parametrize("keep", [0.25, 0.3, 1.0])
def test_as_many_blocks_as_the_share_allows(name: str, keep: float) -> None:
    asked = place((1, 8, 8), (1, 2, 2), keep)
    kept = PATTERNS[name].kept(asked)
    assert kept.shape[1] == 16 and 0.8 * keep * 16 <= kept.shape[2] <= keep * 16
    assert all(len(row) == kept.shape[2] for row in rows(kept))


def test_a_tiny_share_keeps_one_block() -> None:
    assert PATTERNS["window"].kept(place((1, 8, 8), (1, 2, 2), 0.01))[0].flatten().tolist() == list(range(16))


def test_the_cross_is_a_row_and_a_column() -> None:
    kept = rows(PATTERNS["cross"].kept(place((1, 6, 8), (1, 2, 2), 0.6)))
    assert kept[5] == {4, 5, 6, 7, 1, 9}
    assert len(kept) == 12


def test_the_cross_goes_through_the_frames() -> None:
    kept = rows(PATTERNS["cross"].kept(place((3, 4, 4), (1, 2, 2), 0.6)))
    assert kept[0] == {0, 1, 2, 4, 8}


def test_a_cross_that_is_larger_than_the_share() -> None:
    with pytest.raises(UsageError, match=r"'keep': expected at least 0\.5 for the pattern cross .*; received 0\.25"):
        PATTERNS["cross"].kept(place((1, 6, 8), (1, 2, 2), 0.25))


def test_frames_are_the_own_and_some_that_all_read() -> None:
    kept = rows(PATTERNS["frames"].kept(place((4, 2, 2), (1, 1, 2), 0.5)))
    of = [{row // 2 for row in blocks} for blocks in kept]
    assert all(len(frames) == 2 and number // 2 in frames for number, frames in enumerate(of))
    assert {0} < of[2] and {0} < of[4] | of[6], "the first frame is read by the others"


def test_frames_of_an_image() -> None:
    with pytest.raises(UsageError, match="pattern 'frames': expected a video"):
        PATTERNS["frames"].kept(place((1, 4, 4), (1, 2, 2), 0.5))


def test_the_bank_holds_the_most_mass_of_each_head() -> None:
    asked = place((1, 8, 8), (1, 2, 2), 0.25, heads=3)
    kept, masses = PATTERNS["bank"].kept(asked), asked.masses()
    assert kept.shape == (3, 16, 4)
    held = masses.gather(2, kept).sum(-1)
    assert torch.allclose(held, masses.sort(-1, descending=True).values[..., :4].sum(-1))
