"""Weights times the size of what they read."""

from __future__ import annotations

import torch

from ..moments import Moments
from .criterion import Criterion


class Wanda(Criterion):
    """sum_n |W_nj| sqrt(E z_j^2) of the column j."""

    name = "wanda"
    source = "Wanda (arXiv 2306.11695), for whole columns"

    def scores(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """See `Criterion.scores`."""
        assert moments is not None
        return weight.abs().sum(dim=0) * moments.second.sqrt()
