"""The image cut into tiles: the blocks in which attention is sparse."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

import torch

from ...ir.analysis.geometry import Grid

SMALLEST, BEST, LARGEST = 16, 64, 256
"""Tokens of a tile. Products of fewer are slow; more leave nothing to choose from."""


@dataclass(frozen=True)
class Tiles:
    """A grid of tokens cut into equal tiles.

    Attributes:
        grid: frames, height and width of the image, in tokens.
        tile: frames, height and width of a tile, in tokens.
    """

    grid: Grid
    tile: Grid

    @property
    def counts(self) -> Grid:
        """Tiles along each axis."""
        frames, height, width = (size // part for size, part in zip(self.grid, self.tile, strict=True))
        return frames, height, width

    @property
    def number(self) -> int:
        """n, the number of tiles."""
        return prod(self.counts)

    @property
    def block(self) -> int:
        """Tokens of a tile."""
        return prod(self.tile)

    def order(self) -> torch.Tensor:
        """[I] int64: the tokens, tile after tile."""
        (F, h, w), (f, y, x) = self.counts, self.tile
        numbers = torch.arange(prod(self.grid)).reshape(F, f, h, y, w, x)
        return numbers.permute(0, 2, 4, 1, 3, 5).reshape(-1)

    def places(self) -> torch.Tensor:
        """[n, 3] int64: frame, row and column of each tile, in tiles."""
        return torch.cartesian_prod(*(torch.arange(count) for count in self.counts))


def fitting_tile(grid: Grid) -> Grid | None:
    """The tile that divides a grid, of about `BEST` tokens and about as high as wide; None where there is none."""
    divisors = [[d for d in range(1, size + 1) if size % d == 0] for size in grid]
    tiles = [
        tile
        for tile in product(*divisors)
        if SMALLEST <= prod(tile) <= LARGEST
        and all(s // t > 1 or s == 1 for s, t in zip(grid[1:], tile[1:], strict=True))
    ]
    return min(tiles, key=_unfit, default=None)  # type: ignore[return-value]


def _unfit(tile: Grid) -> tuple[float, int, int]:
    """How far a tile is from the best: its size first, then its shape, then its frames."""
    size = prod(tile)
    return max(size / BEST, BEST / size), abs(tile[1] - tile[2]), tile[0]
