"""What is known about the values that linear layers read over the real loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch

from ...calibration.ranges import observe_ranges
from ...calibration.read import SiteStatistics
from ...calibration.run import collected
from ...ir.program import Program
from ..base import Context
from .layers import Group


class Need(IntEnum):
    """What a scheme has to know: nothing, the range of each channel, or everything a calibration store holds."""

    NOTHING = 0
    RANGES = 1
    STATISTICS = 2


class Moments(Protocol):
    """What methods that judge by outputs ask of a value: a site of a calibration store has it, `Measured` too."""

    def gram(self) -> np.ndarray:
        """[M, M] mean of x x^T."""
        ...

    def rows(self) -> np.ndarray:
        """[rows, M] a choice of rows."""
        ...

    def mean_abs(self) -> np.ndarray:
        """[M] mean magnitude of each channel."""
        ...


@dataclass(frozen=True, eq=False)
class Measured:
    """Moments that were taken or computed here.

    Attributes:
        second: [M, M] float64, mean of x x^T.
        kept: [rows, M] float32, a choice of rows.
    """

    second: torch.Tensor
    kept: torch.Tensor

    def gram(self) -> np.ndarray:
        """See `Moments.gram`."""
        return self.second.numpy()

    def rows(self) -> np.ndarray:
        """See `Moments.rows`."""
        return self.kept.numpy()

    def mean_abs(self) -> np.ndarray:
        """See `Moments.mean_abs`; of the rows that were kept."""
        return self.kept.abs().mean(dim=0).numpy()


@dataclass(frozen=True, eq=False)
class Inputs:
    """A value [..., M] that layers read, divided by the scale that smoothing has given it.

    Attributes:
        low: [buckets, M] smallest value of each channel in each timestep bucket.
        high: [buckets, M] largest value.
        scale: [M] that the value of the moments is divided by.
        moments: of a calibration store; None where only ranges are known.
    """

    low: torch.Tensor
    high: torch.Tensor
    scale: torch.Tensor
    moments: Moments | None = None

    @property
    def salience(self) -> torch.Tensor:
        """[buckets, M] largest magnitude of each channel in each bucket."""
        return torch.maximum(-self.low, self.high)

    @property
    def largest(self) -> torch.Tensor:
        """[M] largest magnitude of each channel."""
        return self.salience.amax(dim=0)

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """[M] mean magnitude of each channel."""
        return _tensor(self._known.mean_abs()) / self.scale

    def gram(self) -> torch.Tensor:
        """[M, M] float64: mean of x x^T.

        Raises:
            UsageError: the store has none for this value, or of too few rows.
        """
        scale = self.scale.to(torch.float64)
        return torch.from_numpy(self._known.gram()).to(torch.float64) / torch.outer(scale, scale)

    def rows(self) -> torch.Tensor:
        """[rows, M] a choice of rows out of all samples, calls and branches."""
        return _tensor(self._known.rows()) / self.scale

    def divided(self, scale: torch.Tensor) -> Inputs:
        """The same value divided by a scale [M] of positive numbers."""
        return replace(self, low=self.low / scale, high=self.high / scale, scale=self.scale * scale)

    def less(self, offset: float) -> Inputs:
        """The ranges of the same value less a constant; its moments are others and not known."""
        return replace(self, low=self.low - offset, high=self.high - offset, moments=None)

    def rotated(self, matrix: torch.Tensor) -> Inputs:
        """The same value times an orthogonal matrix [M, M]; its ranges are those of the rows that are known."""
        rows = self.rows() @ matrix.to(torch.float32)
        moments = Measured(matrix.T @ self.gram() @ matrix, rows)
        return Inputs(rows.amin(dim=0, keepdim=True), rows.amax(dim=0, keepdim=True), torch.ones(len(matrix)), moments)

    @property
    def _known(self) -> Moments:
        assert self.moments is not None, "a scheme that reads statistics declares that it needs them"
        return self.moments


def known_inputs(program: Program, groups: Sequence[Group], need: Need, context: Context) -> dict[str, Inputs]:
    """What is known about what each group reads, by the key of the group.

    A store that the user gave comes first; without one the loop is run here, for ranges alone where they are enough.

    Raises:
        UsageError: the store is of another program, or has no such site.
    """
    if need is Need.NOTHING:
        return {}
    store = context.calibration
    if store is not None:
        store.require(program)
    elif need is Need.STATISTICS:
        store = collected(program, context.seed, context.cache, context.progress)
    if store is not None:
        return {group.key: _stored(store.site(group.name, group.key)) for group in groups}
    ranges = observe_ranges(program, {group.source for group in groups}, context.seed, context.progress)
    found = {group.key: ranges[group.source] for group in groups}
    return {key: Inputs(r.low, r.high, torch.ones(r.low.shape[-1])) for key, r in found.items()}


def _stored(site: SiteStatistics) -> Inputs:
    buckets = range(site.calibration.document.buckets)
    low, high = (torch.stack([_tensor(end(bucket)) for bucket in buckets]) for end in (site.low, site.high))
    return Inputs(low, high, torch.ones(low.shape[-1]), site)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))
