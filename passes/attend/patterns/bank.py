"""The blocks that hold most of the probability on calibration samples, for each head on its own."""

from __future__ import annotations

import torch

from .pattern import Pattern, Place


class Bank(Pattern):
    """For each head and each block of queries, the blocks of keys with the largest mean probability.

    The patterns of a bank of shapes (diagonals, stripes, windows) are special cases; what a head attends to is read off
    calibration samples instead of matched with one of them.
    """

    name = "bank"
    source = "Sparse-vDiT, arXiv 2506.03065, and Sparse VideoGen, arXiv 2502.01776: static patterns by head, from calibration"

    def kept(self, place: Place) -> torch.Tensor:
        """The blocks of most mass, in order of their number."""
        masses = place.masses()
        return masses.topk(place.most, dim=-1).indices.sort(dim=-1).values
