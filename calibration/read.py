"""Read the statistics of a finished store; needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..loop.errors import StepfoldError, UsageError, nearest
from .document import REPAIR, STATISTICS, SiteEntry, StoreDocument, damage, read_document
from .tensors import TensorFile, TensorFileError, open_tensors

if TYPE_CHECKING:
    from ..ir.program import Program

Array = np.ndarray
PER_CHANNEL = ("low", "high", "total", "magnitude", "square", "gram", "rows")
PER_CELL = ("low", "high", "total", "magnitude", "square", "count")
ROWS_PER_CHANNEL = 4
"""Fewest rows of a Gram matrix for each of its channels: with fewer, GPTQ fits the samples instead of the model."""


@dataclass(frozen=True)
class Calibration:
    """The statistics of a store.

    Attributes:
        path: folder of the store.
        document: its `store.json`.
    """

    path: Path
    document: StoreDocument

    @property
    def sites(self) -> tuple[SiteEntry, ...]:
        """The values that statistics were taken of, in graph order."""
        return self.document.sites

    def site(self, path: str, node: str | None = None) -> SiteStatistics:
        """The statistics of what a linear layer reads.

        Args:
            path: module path of the layer (see `ir.names.module_path`), or the name of a site.
            node: its node in the graph; needed only where one module is called several times.

        Raises:
            UsageError: the store has no such site, or several.
        """
        found = [i for i, entry in enumerate(self.sites) if any(layer.path == path for layer in entry.layers)]
        found = found or [i for i, entry in enumerate(self.sites) if entry.name == path]
        exact = [i for i in found if any((layer.path, layer.node) == (path, node) for layer in self.sites[i].layers)]
        chosen = exact or found
        if len(chosen) == 1:
            return self.statistics(chosen[0])
        if chosen:
            names = ", ".join(layer.node for i in chosen for layer in self.sites[i].layers if layer.path == path)
            raise UsageError(f"{self.path}: site {path} is called several times; expected one of the nodes {names}.")
        hint = nearest(path, [layer.path for entry in self.sites for layer in entry.layers])
        raise UsageError(f"{self.path}: expected a site of the store; received {path!r}; {hint}")

    def statistics(self, index: int) -> SiteStatistics:
        """The statistics of the site of this number."""
        return SiteStatistics(self, index)

    def require(self, program: Program) -> None:
        """Refuse a program whose layers read other values than those the statistics were taken of.

        Raises:
            UsageError: the message names what differs: weights, loop, conditions, earlier passes.
        """
        from .key import program_parts
        from .store import require_same

        require_same(self.path, self.document, program_parts(program))

    def tensor(self, name: str) -> Array:
        """A tensor of the statistics file.

        Raises:
            StepfoldError: the file is damaged.
        """
        try:
            return self._file.read(name)
        except (TensorFileError, OSError) as error:
            raise StepfoldError(f"{self.path / STATISTICS}: damaged: {error}. {REPAIR}") from error

    @cached_property
    def _file(self) -> TensorFile:
        return open_tensors(self.path / STATISTICS)


@dataclass(frozen=True)
class SiteStatistics:
    """What is known about one value that linear layers read.

    Every figure is over all timestep buckets and branches unless some are chosen: `bucket` by number, `branch` by
    name. A value that is the same for all samples is counted in the conditional branch only.
    """

    calibration: Calibration
    index: int

    @property
    def entry(self) -> SiteEntry:
        """Its name, layers and width."""
        return self.calibration.sites[self.index]

    def count(self, bucket: int | None = None, branch: str | None = None) -> int:
        """Rows seen."""
        return int(self._cells("count", bucket, branch).sum())

    def low(self, bucket: int | None = None, branch: str | None = None) -> Array:
        """[M] smallest value of each channel; +inf where no row was seen."""
        return self._cells("low", bucket, branch).min(axis=(0, 1))

    def high(self, bucket: int | None = None, branch: str | None = None) -> Array:
        """[M] largest value of each channel; -inf where no row was seen."""
        return self._cells("high", bucket, branch).max(axis=(0, 1))

    def mean(self, bucket: int | None = None, branch: str | None = None) -> Array:
        """[M] mean of each channel."""
        return self._mean("total", bucket, branch)

    def mean_abs(self, bucket: int | None = None, branch: str | None = None) -> Array:
        """[M] mean magnitude of each channel."""
        return self._mean("magnitude", bucket, branch)

    def second_moment(self, bucket: int | None = None, branch: str | None = None) -> Array:
        """[M] mean square of each channel."""
        return self._mean("square", bucket, branch)

    def gram(self, rows_per_channel: float = ROWS_PER_CHANNEL) -> Array:
        """[M, M] mean of x x^T over `gram_count` rows of all buckets and branches.

        Args:
            rows_per_channel: fewest rows for each channel; 0 takes any.

        Raises:
            UsageError: the value is wider than the limit of the store, or there are too few rows.
        """
        entry, rows = self.entry, self.gram_count()
        if not entry.gram:
            limit = self.calibration.document.number("gram_width")
            raise UsageError(
                f"{self.calibration.path}: site {entry.name}: expected a Gram matrix; its {entry.width} channels are "
                f"more than the {limit} of this store. Choose a method without one for this site."
            )
        if rows < rows_per_channel * entry.width:
            raise UsageError(
                f"{self.calibration.path}: site {entry.name}: expected at least {rows_per_channel:g} rows for each of "
                f"{entry.width} channels for a Gram matrix; received {rows}. Calibrate with more --samples."
            )
        return self._tensor("gram") / rows

    def has_gram(self) -> bool:
        """Whether there is a Gram matrix of at least `ROWS_PER_CHANNEL` rows for each channel."""
        return self.entry.gram and self.gram_count() >= ROWS_PER_CHANNEL * self.entry.width

    def gram_count(self) -> int:
        """Rows in the Gram matrix."""
        return int(self._tensor("gram_count")[0])

    def rows(self) -> Array:
        """[rows, M] float32: a seeded choice of at most 512 rows out of all samples, calls and branches."""
        return self._tensor("rows")

    def rows_bucket(self) -> Array:
        """[rows] the bucket of each raw row."""
        return self._tensor("rows_at")[:, 0]

    def rows_branch(self) -> Array:
        """[rows] the branch of each raw row, 0 conditional and 1 unconditional."""
        return self._tensor("rows_at")[:, 1]

    def ranges(self) -> Array:
        """[buckets] largest magnitude over channels and branches; 0 where no row was seen."""
        low, high = self._tensor("low"), self._tensor("high")
        return np.maximum(0, np.maximum(-low, high).max(axis=(1, 2)))

    def drift(self) -> float:
        """How the range moves over time: its maximum over buckets by its median (Q6 of the method cards).

        Up to `STEADY` one static scale serves all timesteps. Infinite where most buckets hold nothing but zeros.
        """
        ranges = self.ranges()
        largest, median = float(ranges.max()), float(np.median(ranges))
        if largest == 0:
            return 1.0
        return largest / median if median > 0 else float("inf")

    def _mean(self, name: str, bucket: int | None, branch: str | None) -> Array:
        return self._cells(name, bucket, branch).sum(axis=(0, 1)) / max(1, self.count(bucket, branch))

    def _cells(self, name: str, bucket: int | None, branch: str | None) -> Array:
        array, branches = self._tensor(name), self.calibration.document.branches
        if bucket is not None:
            array = array[bucket : bucket + 1]
        if branch is not None:
            at = branches.index(branch)
            array = array[:, at : at + 1]
        return array

    def _tensor(self, name: str) -> Array:
        array = self.calibration.tensor(f"{self.index:04d}.{name}")
        document = self.calibration.document
        cells = (document.buckets, len(document.branches))
        leading, width = name in PER_CELL, name in PER_CHANNEL
        if (leading and array.shape[:2] != cells) or (width and array.shape[-1:] != (self.entry.width,)):
            raise StepfoldError(
                f"{self.calibration.path / STATISTICS}: damaged: {name} of site {self.entry.name} has shape "
                f"{list(array.shape)} for {cells[0]} buckets, {cells[1]} branches and {self.entry.width} channels. {REPAIR}"
            )
        return array


def open_store(path: Path, program: Program) -> Calibration:
    """Open a finished store for a program.

    Args:
        path: folder of the store.
        program: program that its statistics are to be used for; passes that keep what linear layers read may have run.

    Raises:
        UsageError: no store, an unfinished one, or one of another model, loop or pass history.
        StepfoldError: it is damaged.
    """
    calibration = open_finished(path)
    calibration.require(program)
    return calibration


def open_finished(path: Path) -> Calibration:
    """Open a finished store, whatever it was made of.

    Raises:
        UsageError: no store, or an unfinished one.
        StepfoldError: it is damaged.
    """
    document = read_document(path)
    if not document.finished:
        raise UsageError(
            f"{path}: expected a finished calibration store; received one that was interrupted. Run the same "
            "`stepfold calibrate` again: it goes on where it stopped."
        )
    for name, entry in document.files.items():
        problem = damage(path, name, entry, content=name == STATISTICS)
        if problem is not None:
            raise StepfoldError(problem)
    return Calibration(path, document)
