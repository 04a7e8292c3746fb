"""What a pattern of sparse attention owes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..tiles import Tiles


@dataclass(frozen=True)
class Place:
    """Where a pattern is asked for.

    Attributes:
        tiles: the image in blocks.
        keep: share of the blocks that each block of queries may read, at most; at least one is read.
        masses: measures the attention on calibration samples: [H, n, n] mean probability that the queries of a block give to
            the keys of another, over samples and calls of the loop.
    """

    tiles: Tiles
    keep: float
    masses: Callable[[], torch.Tensor]

    @property
    def most(self) -> int:
        """The largest number of blocks within `keep`."""
        return max(1, int(self.keep * self.tiles.number + 1e-9))


class Pattern(ABC):
    """Chooses the blocks of keys that each block of queries reads.

    Attributes:
        name: name of the pattern in recipes.
        source: paper it comes from.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def kept(self, place: Place) -> torch.Tensor:
        """[G, n, m] int64: the m blocks that each of the n blocks reads; G is 1, or the number of heads.

        Raises:
            UsageError: the pattern does not fit the grid.
        """
