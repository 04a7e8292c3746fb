"""What is known about the values that pruned layers read over the real loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from ...calibration.read import SiteStatistics
from ...calibration.run import collected
from ...ir.names import module_path
from ...ir.program import Program
from ..base import Context


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a value [..., M] over calls, branches and tokens, in float64.

    Attributes:
        mean: [M].
        second: [M] mean square of each channel.
        gram: [M, M] mean of x x^T; None where the store has none, or of too few rows.
    """

    mean: torch.Tensor
    second: torch.Tensor
    gram: torch.Tensor | None

    @property
    def variance(self) -> torch.Tensor:
        """[M] of each channel."""
        return (self.second - self.mean.square()).clamp(min=0)

    @classmethod
    def of_rows(cls, rows: torch.Tensor) -> Moments:
        """The moments of rows [T, M]."""
        rows = rows.to(torch.float64)
        return cls(rows.mean(dim=0), rows.square().mean(dim=0), rows.T @ rows / len(rows))


def known_moments(program: Program, layers: Sequence[fx.Node], context: Context) -> dict[fx.Node, Moments]:
    """The moments of what linear layers of the computing slots read.

    A store that the user gave comes first; without one the loop is run here.

    Raises:
        UsageError: the store is of another program, such as this one before an earlier pass.
    """
    store = context.calibration
    if store is not None:
        store.require(program)
    else:
        store = collected(program, context.seed, context.cache, context.progress)
    return {layer: _stored(store.site(module_path(layer), layer.name)) for layer in layers}


def _stored(site: SiteStatistics) -> Moments:
    gram = _tensor(site.gram()) if site.has_gram() else None
    return Moments(_tensor(site.mean()), _tensor(site.second_moment()), gram)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.float64))
