"""Magnitude of the weights."""

from __future__ import annotations

import torch

from ..moments import Moments
from .criterion import Criterion


class Magnitude(Criterion):
    """|W_j|^2 of the column j: needs no statistics."""

    name = "magnitude"
    source = "Han et al., Learning both Weights and Connections (arXiv 1506.02626), for whole columns"
    reads_moments = False

    def scores(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """See `Criterion.scores`."""
        return weight.square().sum(dim=0)
