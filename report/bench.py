"""Measure bundles beside baselines: latency in turns, quality against the full fp32 loop, size and memory."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.cores import physical_cores
from ..bundle.cache import Cache
from ..bundle.reader import Bundle, read
from ..loop.errors import StepfoldError, UsageError
from ..runtime.native import require_allowed
from . import work
from .baselines.names import Baseline, parse_all
from .machine import describe_machine
from .measure import WARMUP, KeptReference, Measured, Measurement, Settings
from .page import PAGE, build_page, describe_bundle, missing_packages, write_page
from .plan import (
    Models,
    Prepared,
    RowPlan,
    baseline_plans,
    bundle_name,
    bundle_plans,
    inspected,
    prepare,
    reference_plan,
)
from .processes import COMMAND, Workers
from .records import Protocol, Report, Row, Skipped, write_report
from .work import Work

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
EAGER = "eager"  # the row that speedups are counted from
REQUEST = "request.safetensors"


def silent(task: str, done: int, total: int) -> None:
    """Report progress to nobody."""


def bench(
    bundles: Sequence[Path],
    *,
    reference: Path | None = None,
    baselines: Sequence[str] = (),
    count: int = 1,
    quality_count: int = 64,
    repeats: int = 10,
    seed: int = 0,
    out: Path | None = None,
    progress: Progress = silent,
    cache: Path | None = None,
    allow_native: bool = False,
    command: Sequence[str] = COMMAND,
) -> Report:
    """Measure every bundle and baseline, each in a process of its own, taking turns.

    Args:
        bundles: folders that `optimize` wrote; all of one model.
        reference: checkpoint whose full fp32 loop is the measure of quality; baselines run it too.
        baselines: `NAME[@STEPS][:solver]`, a row each.
        count: samples of one timed call.
        quality_count: samples that quality is measured over.
        repeats: timed calls of each row.
        seed: seed of the noise.
        out: folder for report.json and report.html; None writes nothing.
        progress: called with (task, done, total).
        cache: keeps exported models and reference samples for the next bench; None keeps nothing.
        allow_native: whether native code that was not built here by this user may be opened.
        command: starts one worker, see `stepfold.report.worker`.

    Raises:
        UsageError: a bundle, the checkpoint or a baseline does not exist, two rows have one name, the bundles are of
            different models, or one holds native code.
        BundleError: a bundle is damaged.
        StepfoldError: no row could be measured.
    """
    parsed = parse_all(baselines)
    _check(bundles, reference, parsed, {"--count": count, "--quality-count": quality_count, "--repeats": repeats}, seed)
    opened, threads = [read(path) for path in bundles], physical_cores()
    for bundle in opened:
        require_allowed(bundle, allow_native)
    settings = Settings(count, quality_count if work.of_bundles(opened).loop is not None else count, repeats, threads)
    with (
        tempfile.TemporaryDirectory(prefix="stepfold-bench-") as name,
        Workers(threads, Path(name), command) as workers,
    ):
        session = _Session(opened, parsed, settings, seed, workers, Path(name), cache, progress, allow_native)
        outcome = session.run(reference, with_model=out is not None and missing_packages() is None)
    report = _report(outcome, settings, seed)
    if out is not None:
        write_report(report, out)
        _write_page(out, report, opened, outcome)
    return report


@dataclass(frozen=True)
class _Outcome:
    """What a session found out: rows, baselines left out before, how the model is called, the checkpoint, its sites."""

    measured: Measured
    skipped: Sequence[Skipped]
    work: Work
    prepared: Prepared | None
    model: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Session:
    """One bench with its processes running."""

    bundles: Sequence[Bundle]
    baselines: Sequence[Baseline]
    settings: Settings
    seed: int
    workers: Workers
    folder: Path
    cache: Path | None
    progress: Progress
    allow_native: bool

    def run(self, reference: Path | None, with_model: bool) -> _Outcome:
        """Measure, with or without a reference; `with_model` looks for the rates and sites of the checkpoint too."""
        if reference is None:
            model_work = work.of_bundles(self.bundles)
            plans = bundle_plans(self.bundles, None, self.allow_native)
            return _Outcome(self._measure(plans, model_work, None), [], model_work, None, None)
        self.progress("reading the checkpoint", 0, 1)
        prepared = prepare(self.workers, reference, self.baselines, self.bundles, self.folder)
        model = inspected(self.workers, prepared) if with_model else None
        kept = None if self.cache is None else Cache(self.cache / "baselines", "baseline")
        models = Models(self.folder / "baselines", kept)
        more, skipped = baseline_plans(
            self.workers, prepared, self.baselines, models, self.settings.threads, self.progress
        )
        plans = [*bundle_plans(self.bundles, prepared.work.guidance, self.allow_native), *more]
        return _Outcome(self._measure(plans, prepared.work, prepared), skipped, prepared.work, prepared, model)

    def _measure(self, plans: Sequence[RowPlan], model_work: Work, prepared: Prepared | None) -> Measured:
        request = self.folder / REQUEST
        work.write(request, model_work.arrays(self.settings.total, self.seed))
        measurement = Measurement(self.workers, request, self.settings, self.folder, self.progress)
        cached = KeptReference.of(self.cache, prepared.key, request) if self.cache and prepared else None
        reference = reference_plan(prepared) if prepared else None
        return measurement.run(plans, reference, cached, model_work.compared)


def _check(
    bundles: Sequence[Path],
    reference: Path | None,
    baselines: Sequence[Baseline],
    counts: dict[str, int],
    seed: int,
) -> None:
    """Refuse what cannot work before anything is started."""
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"{name}: expected at least 1; received {value}.")
    if seed < 0:
        raise UsageError(f"--seed: expected a number from 0; received {seed}.")
    if not bundles:
        raise UsageError("bench: expected at least one bundle; received none. Make one with `stepfold optimize`.")
    if baselines and reference is None:
        raise UsageError("--baselines: they run the checkpoint; name it with --reference CHECKPOINT.")
    if reference is not None and not os.path.isdir(reference):
        raise UsageError(f"--reference: expected the folder of a checkpoint; received {reference}.")
    names = [bundle_name(path) for path in bundles] + [baseline.name for baseline in baselines]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"bench: expected rows of different names; received {name!r} {names.count(name)} times. A bundle's row "
                "has the name of its folder: rename one."
            )


def _report(outcome: _Outcome, settings: Settings, seed: int) -> Report:
    """Put the report together.

    Raises:
        StepfoldError: it has no rows.
    """
    rows, prepared = outcome.measured.rows, outcome.prepared
    left_out = (*outcome.skipped, *outcome.measured.skipped)
    if not rows:
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in left_out)
        raise StepfoldError(f"bench: expected at least one row that runs; received none. {reasons}")
    identity = {"class": prepared.class_name, "weights_sha256": prepared.weights_sha256} if prepared else None
    protocol = Protocol(
        warmup=WARMUP,
        repeats=settings.repeats,
        interleaved=True,
        threads=settings.threads,
        count=settings.count,
        quality_count=settings.quality_count,
        seed=seed,
        guidance=outcome.work.guidance,
        reference=identity,
    )
    return Report(protocol=protocol, machine=describe_machine(), rows=with_speedup(rows), skipped=left_out)


def with_speedup(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with their speedup over the row `eager`, when there is one."""
    eager = next((row for row in rows if row.name == EAGER and row.kind == "baseline"), None)
    if eager is None:
        return tuple(rows)
    return tuple(row.model_copy(update={"speedup": eager.latency_ms.median / row.latency_ms.median}) for row in rows)


def _write_page(out: Path, report: Report, bundles: Sequence[Bundle], outcome: _Outcome) -> None:
    """Write report.html, or say what to install for it."""
    missing = missing_packages()
    if missing is not None:
        logger.warning("%s was not written: %s", out / PAGE, missing)
        return
    title = "stepfold bench: " + ", ".join(bundle_name(bundle.path) for bundle in bundles)
    described = [describe_bundle(bundle.path) for bundle in bundles]
    pictures = outcome.measured.pictures
    write_page(out / PAGE, build_page(title, report.document(), described, pictures, outcome.model))
