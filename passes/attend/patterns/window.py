"""A window of neighbouring tiles."""

from __future__ import annotations

from itertools import product
from math import prod

import torch

from ..tiles import Tiles
from .pattern import Pattern, Place


class Window(Pattern):
    """The tiles around the query's own, in a window that is moved inwards at the borders, so that all have the same size."""

    name = "window"
    source = "STA, arXiv 2502.04507, section 3; CLEAR (arXiv 2412.16112) in blocks"

    def kept(self, place: Place) -> torch.Tensor:
        """The tiles of the largest window within the share, as high as wide where that is possible."""
        return windows(place.tiles, _sizes(place.tiles, place.most))[None]


def windows(tiles: Tiles, sizes: tuple[int, ...]) -> torch.Tensor:
    """[n, m] int64: the tiles of a window around each tile.

    Args:
        tiles: the image in tiles.
        sizes: extent of the window along each axis, in tiles.
    """
    counts, places = torch.tensor(tiles.counts), tiles.places()
    extent = torch.tensor(sizes)
    first = (places - extent // 2).clamp(min=0).minimum(counts - extent)  # [n, 3]
    steps = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, 3)  # [m, 3]
    inside = first[:, None] + steps
    return (inside[..., 0] * counts[1] + inside[..., 1]) * counts[2] + inside[..., 2]


def _sizes(tiles: Tiles, most: int) -> tuple[int, ...]:
    """The window of most tiles within a number; of several, the most even one."""
    choices = product(*(range(1, count + 1) for count in tiles.counts))
    fitting = [sizes for sizes in choices if prod(sizes) <= most]
    return max(fitting, key=lambda sizes: (prod(sizes), -_uneven(tiles, sizes)))


def _uneven(tiles: Tiles, sizes: tuple[int, ...]) -> float:
    """How much the shares of the axes differ."""
    shares = [size / count for size, count in zip(sizes, tiles.counts, strict=True)]
    return max(shares) - min(shares)
