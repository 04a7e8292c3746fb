"""The row, the column and the frames that cross at a tile."""

from __future__ import annotations

import torch

from ....loop.errors import UsageError
from .pattern import Pattern, Place


class Cross(Pattern):
    """The tiles that differ from the query's own along one axis at most: a row, a column, and the same place of all frames."""

    name = "cross"
    source = "GRAT, arXiv 2505.14687: criss-cross regions of grouped queries"

    def kept(self, place: Place) -> torch.Tensor:
        """All tiles that share at least two of frame, row and column."""
        places, counts = place.tiles.places(), place.tiles.counts
        alike = (places[:, None] == places[None]).sum(dim=-1) >= 2  # [n, n]
        m = sum(counts) - 2
        if m > place.most:
            raise UsageError(
                f"pass sparsify_attention: option 'keep': expected at least {m / place.tiles.number:.3g} for the pattern cross "
                f"on {counts[0]} x {counts[1]} x {counts[2]} tiles; received {place.keep:g}. Choose the pattern window, or "
                "larger tiles."
            )
        return alike.nonzero()[:, 1].reshape(1, place.tiles.number, m)
