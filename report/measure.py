"""Run the rows: quality first, then the timed calls in turns."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue

from ..bundle.cache import Cache, key_of
from ..bundle.files import sha256_of
from ..loop.budget import PsnrFigures
from ..loop.metrics import drift, sample_psnr, ssim
from ..loop.spec import Values
from ..runtime.comparison import Comparison, Pictures
from .plan import RowPlan
from .processes import Worker, WorkerError, Workers
from .records import Latency, Psnr, Row, Skipped

Array = np.ndarray
Progress = Callable[[str, int, int], None]

WARMUP = 1
"""Untimed calls before the timed one of every turn.

While the other rows have their turns the processor's caches, and on some systems the memory of a stopped process, go to
them. A fast row would pay for that with half of its time, a slow one would not notice.
"""
REFERENCE_BATCH = 16  # smallest batch of the reference: in fp32 samples do not depend on their batch mates
SHOWN = 10  # samples of each row that are kept for the page


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        count: samples of one timed call.
        quality_count: samples that quality is measured over.
        repeats: timed calls of each row.
        threads: number of threads of each row.
    """

    count: int
    quality_count: int
    repeats: int
    threads: int

    @property
    def total(self) -> int:
        """Samples in the request: `quality_count` in whole batches of `count`, so that no engine sees another size."""
        return -(-self.quality_count // self.count) * self.count


@dataclass
class Measured:
    """What came out: rows in their order, rows that failed, and samples of each row for the page."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    pictures: Pictures = field(default_factory=Pictures)


@dataclass
class _Live:
    """An opened row and what is known about it."""

    plan: RowPlan
    worker: Worker
    evaluations: int | None
    size_bytes: int
    samples: Array | None = None
    milliseconds: list[float] = field(default_factory=list)


class Measurement:
    """One bench in progress."""

    def __init__(self, workers: Workers, request: Path, settings: Settings, folder: Path, progress: Progress):
        """Prepare to measure.

        Args:
            workers: start processes.
            request: the samples to compute, see `work`.
            settings: how much.
            folder: folder for samples.
            progress: called with (task, done, total).
        """
        self._workers, self._request, self._settings = workers, request, settings
        self._folder, self._progress = folder, progress
        self._skipped: list[Skipped] = []
        self._live: list[_Live] = []
        self._reference: Array | None = None

    def run(
        self, plans: Sequence[RowPlan], reference: RowPlan | None, cached: KeptReference | None, of: Values | None
    ) -> Measured:
        """Measure.

        Args:
            plans: the rows, in order.
            reference: what quality is measured against.
            cached: where the reference samples of this request are kept, if anywhere.
            of: what samples are; None for the outputs of a component, which are compared by their drift alone.

        Raises:
            WorkerError: the reference cannot be computed.
        """
        for i, plan in enumerate(plans):
            self._progress("opening engines", i, len(plans))
            self._open(plan)
        if reference is not None:
            self._reference = self._reference_samples(reference, cached)
        self._sample_all()
        self._time_all()
        rows = [row for live in list(self._live) if (row := self._finished(live, of)) is not None]
        return Measured(rows, self._skipped, self._pictures(of))

    def _pictures(self, of: Values | None) -> Pictures:
        """The first samples of each row, and the worst of those that are not the reference itself."""
        sampled = {live.plan.name: live.samples for live in self._live if live.samples is not None}
        first = {name: samples[:SHOWN] for name, samples in sampled.items()}
        reference = self._reference
        if reference is None or of is None:
            return Pictures(first if reference is None else {"reference": reference[:SHOWN], **first})
        others = {name: samples for name, samples in sampled.items() if samples is not reference}
        worst = {name: _worst(samples, reference, of) for name, samples in others.items()}
        return Pictures({"reference": reference[:SHOWN], **first}, worst)

    def _open(self, plan: RowPlan) -> None:
        worker = self._workers.start(plan.name)
        message = {"do": "open", "row": dict(plan.row), "threads": self._settings.threads}
        try:
            answer = worker.request(message)
        except WorkerError as error:
            worker.close()
            self._skipped.append(Skipped(name=plan.name, reason=str(error)))
        else:
            self._live.append(_Live(plan, worker, answer["evaluations"], answer["size_bytes"]))

    def _drop(self, live: _Live, reason: str) -> None:
        live.worker.close()
        self._live.remove(live)
        self._skipped.append(Skipped(name=live.plan.name, reason=reason))

    def _reference_samples(self, plan: RowPlan, cached: KeptReference | None) -> Array:
        """[quality_count, ...]: from the cache, from the row that computes the same, or from a process of its own."""
        kept = None if cached is None else cached.read()
        if kept is not None:
            return kept[: self._settings.quality_count]
        shared = next((live for live in self._live if live.plan.is_reference), None)
        worker = shared.worker if shared else self._workers.start(plan.name)
        try:
            if shared is None:
                worker.request({"do": "open", "row": dict(plan.row), "threads": self._settings.threads})
            batch = max(self._settings.count, REFERENCE_BATCH)
            samples = self._samples(worker, "reference", batch, self._settings.quality_count)
        except WorkerError as error:
            raise WorkerError(f"the reference could not be computed: {error}", error.kind) from None
        finally:
            if shared is None:
                worker.close()
        if cached is not None:
            cached.write(samples)
        return samples

    def _sample_all(self) -> None:
        """Samples of every row, one batch for the page without a reference; the reference is not computed twice."""
        wanted = self._settings.count if self._reference is None else self._settings.quality_count
        for live in list(self._live):
            if live.plan.is_reference and self._reference is not None:
                live.samples = self._reference
                continue
            try:
                samples = self._samples(live.worker, f"sampling {live.plan.name}", self._settings.count, wanted)
            except WorkerError as error:
                self._drop(live, str(error))
                continue
            live.samples = samples
            if not np.isfinite(samples).all():
                self._drop(live, f"{int((~np.isfinite(samples)).sum())} values of its samples are not finite.")

    def _samples(self, worker: Worker, task: str, batch: int, wanted: int) -> Array:
        """[wanted, ...] in whole batches."""
        out, parts = self._folder / "samples.npy", []
        for start in range(0, wanted, batch):
            self._progress(task, start, wanted)
            worker.request(self._sample_message(start, min(start + batch, self._settings.total), out))
            parts.append(np.load(out, allow_pickle=False))
        self._progress(task, wanted, wanted)
        return np.concatenate(parts)[:wanted]

    def _sample_message(self, start: int, stop: int, out: Path | None) -> dict[str, Any]:
        target = None if out is None else str(out)
        return {"do": "sample", "request": str(self._request), "start": start, "stop": stop, "out": target}

    def _time_all(self) -> None:
        """One timed call of each row in turn, so that slow drifts of the machine reach all of them."""
        repeats, message = self._settings.repeats, self._sample_message(0, self._settings.count, None)
        for turn in range(repeats):
            self._progress("timing", turn, repeats)
            for live in list(self._live):
                try:
                    for _ in range(WARMUP):
                        live.worker.request(message)
                    live.milliseconds.append(1000 * live.worker.request(message)["seconds"])
                except WorkerError as error:
                    self._drop(live, str(error))
        self._progress("timing", repeats, repeats)

    def _finished(self, live: _Live, of: Values | None) -> Row | None:
        try:
            peak = live.worker.request({"do": "finish"})["peak_memory_bytes"]
        except WorkerError as error:
            self._drop(live, str(error))
            return None
        live.worker.close()
        return Row(
            name=live.plan.name,
            kind=live.plan.kind,
            latency_ms=latency(live.milliseconds),
            evaluations=live.evaluations,
            size_bytes=live.size_bytes,
            peak_memory_bytes=peak,
            **quality(live.samples, self._reference, of),
        )


def latency(milliseconds: Sequence[float]) -> Latency:
    """Median and deciles of the calls."""
    p10, median, p90 = np.percentile(milliseconds, [10, 50, 90])
    return Latency(
        median=float(median),
        p10=float(p10),
        p90=float(p90),
        n=len(milliseconds),
        samples_ms=tuple(round(value, 4) for value in milliseconds),
    )


def quality(samples: Array | None, reference: Array | None, of: Values | None) -> dict[str, Any]:
    """The keys of a row that compare samples [B, ...] with the reference [B, ...].

    The PSNR of latents takes its peak from the reference, and has no bounds to clip to. SSIM needs images [B, C, H, W].
    """
    if samples is None or reference is None:
        return {}
    found: dict[str, Any] = {"drift": drift(samples, reference)}
    if of is not None:
        found["psnr_db"] = Psnr(**asdict(PsnrFigures.of(sample_psnr(of)(samples, reference))))
        images = of == "pixels" and samples.ndim == 4
        found["ssim"] = float(ssim(samples, reference).mean()) if images else None
    return found


def _worst(samples: Array, reference: Array, of: Values) -> Array:
    """[2, ...] the sample of least PSNR, behind its reference."""
    return Comparison.of(samples, reference, sample_psnr(of)(samples, reference), 0).worst


@dataclass(frozen=True)
class KeptReference:
    """The reference samples of a request, kept for the next bench.

    Attributes:
        cache: where results of earlier runs are kept.
        parts: what the samples depend on.
    """

    cache: Cache
    parts: Mapping[str, JsonValue]

    @classmethod
    def of(cls, folder: Path, key: str, request: Path) -> KeptReference:
        """Those of a request.

        Args:
            folder: folder of all caches.
            key: key of the checkpoint and of how it is called.
            request: the file with the noise and the conditions.
        """
        parts: dict[str, JsonValue] = {"checkpoint": key, "request": sha256_of(request)}
        return cls(Cache(folder / "references", "reference sample"), parts)

    def read(self) -> Array | None:
        """[quality_count, ...], None where there are none."""
        content = self.cache.read(key_of(self.parts))
        return None if content is None else np.load(io.BytesIO(content), allow_pickle=False)

    def write(self, samples: Array) -> None:
        """Keep the samples."""
        content = io.BytesIO()
        np.save(content, samples, allow_pickle=False)
        self.cache.write(key_of(self.parts), "of a bench", self.parts, "samples.npy", content.getvalue())
