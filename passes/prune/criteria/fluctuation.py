"""Weights times how much what they read varies."""

from __future__ import annotations

import torch

from ..moments import Moments
from .criterion import Criterion


class Fluctuation(Criterion):
    """Var(z_j) |W_j|^2 of the column j: what does not vary can go into the bias."""

    name = "fluctuation"
    source = "FLAP (arXiv 2312.11983), WIFV"

    def scores(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """See `Criterion.scores`."""
        assert moments is not None
        return moments.variance * weight.square().sum(dim=0)
