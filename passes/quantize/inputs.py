"""What is known about the values that linear layers read over the real loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import fx

from ...calibration.ranges import Observed, observe
from ...calibration.read import SiteStatistics
from ...calibration.run import collected
from ...ir.program import Program
from ..base import Context
from .layers import Group


class Need(IntEnum):
    """What a scheme has to know: nothing, the range of each channel, Gram matrices beside it, or a whole store.

    Gram matrices are left out where they would be too large together, or made of too few rows.
    """

    NOTHING = 0
    RANGES = 1
    GRAMS = 2
    STATISTICS = 3


FLOAT_BYTES = 4
GRAM_BYTES = 2 << 30
"""Of all Gram matrices that `Need.GRAMS` holds at once, in float32; the widest are left out first."""


class Moments(Protocol):
    """What methods that judge by outputs ask of a value: a site of a calibration store has it, `Measured` too."""

    def has_gram(self) -> bool:
        """Whether there is a Gram matrix of enough rows."""
        ...

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
        kept: [rows, M] float32, a choice of rows; None where only Gram matrices were asked for.
    """

    second: torch.Tensor
    kept: torch.Tensor | None = None

    def has_gram(self) -> bool:
        """See `Moments.has_gram`."""
        return True

    def gram(self) -> np.ndarray:
        """See `Moments.gram`."""
        return self.second.numpy()

    def rows(self) -> np.ndarray:
        """See `Moments.rows`."""
        return self._rows.numpy()

    def mean_abs(self) -> np.ndarray:
        """See `Moments.mean_abs`; of the rows that were kept."""
        return self._rows.abs().mean(dim=0).numpy()

    @property
    def _rows(self) -> torch.Tensor:
        assert self.kept is not None, "a scheme that reads rows declares that it needs statistics"
        return self.kept


@dataclass(frozen=True, eq=False)
class Inputs:
    """A value [..., M] that layers read, divided by the scale that smoothing has given it.

    Attributes:
        low: [buckets, M] smallest value of each channel in each timestep bucket.
        high: [buckets, M] largest value.
        scale: [M] that the value of the moments is divided by.
        moments: moments from a calibration store, or collected here; None where only ranges are known.
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

    @property
    def has_gram(self) -> bool:
        """Whether `gram` has something to return."""
        return self.moments is not None and self.moments.has_gram()

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

    A store that the user gave comes first; without one the loop is run here, and only what is needed is collected.

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
    grams = _affordable(groups) if need is Need.GRAMS else set[fx.Node]()
    seen = observe(program, {group.source for group in groups}, context.seed, context.progress, grams)
    return {group.key: _observed(seen, group.source) for group in groups}


def _affordable(groups: Sequence[Group]) -> set[fx.Node]:
    """The values whose Gram matrices together take at most `GRAM_BYTES`, the narrow ones first."""
    widths = {group.source: group.layers[0].weight.shape[1] for group in groups}
    sources = sorted(widths, key=widths.__getitem__)
    bytes_so_far = accumulate(FLOAT_BYTES * widths[source] ** 2 for source in sources)
    return {source for source, held in zip(sources, bytes_so_far, strict=True) if held <= GRAM_BYTES}


def _observed(seen: Observed, source: fx.Node) -> Inputs:
    ends, gram = seen.ranges[source], seen.grams.get(source)
    return Inputs(ends.low, ends.high, torch.ones(ends.low.shape[-1]), None if gram is None else Measured(gram))


def _stored(site: SiteStatistics) -> Inputs:
    buckets = range(site.calibration.document.buckets)
    low, high = (torch.stack([_tensor(end(bucket)) for bucket in buckets]) for end in (site.low, site.high))
    return Inputs(low, high, torch.ones(low.shape[-1]), site)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))
