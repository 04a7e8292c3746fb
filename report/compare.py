"""Set reports of `bench` side by side; the first is the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..loop.errors import UsageError
from .records import Latency, Report, Row, read_report

RESAMPLES = 4000
CONFIDENCE = 0.95
DECILES_OF_NORMAL = 2.563  # from the 10th to the 90th percentile, in standard deviations
MEDIAN_ERROR = 1.2533  # sqrt(pi / 2): standard error of a median over that of a mean


@dataclass(frozen=True)
class ComparedRow:
    """A row against that of the base.

    Attributes:
        report: the file, as it was given.
        name: name of the row.
        base_name: name of the base row that it is compared with.
        kind: `bundle` or `baseline`.
        latency_ratio: median over median of the base; above 1 is slower.
        latency_ratio_ci: 95 % confidence interval of it, from the spread of the calls inside each run. Speed that
            differs between two runs of one engine, 20 % is common, is not in it.
        psnr_change_db: mean PSNR minus that of the base, None where either has none.
        size_ratio: bytes over bytes of the base, None for a base of no size.
    """

    report: str
    name: str
    base_name: str
    kind: Literal["bundle", "baseline"]
    latency_ratio: float
    latency_ratio_ci: tuple[float, float]
    psnr_change_db: float | None
    size_ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare --json` prints.

    Attributes:
        rows: every row that the base has a counterpart of.
        gate: None when no limit was given.
        failures: what failed the gate, one line each.
        unmatched: rows without a counterpart in the base.
    """

    rows: tuple[ComparedRow, ...]
    gate: Literal["passed", "failed"] | None
    failures: tuple[str, ...]
    unmatched: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The JSON object."""
        return asdict(self)


def compare(
    reports: Sequence[Path], max_slowdown: float | None = None, max_psnr_drop: float | None = None
) -> Comparison:
    """Compare reports with the first of them.

    Args:
        reports: two or more `report.json` files, or folders that hold one.
        max_slowdown: percent by which the median latency of a bundle may exceed that of the base.
        max_psnr_drop: dB by which its mean PSNR may fall below that of the base.

    Raises:
        UsageError: fewer than two reports, a limit that is no number from 0, or a file that is no report.
    """
    _check_limits(reports, max_slowdown, max_psnr_drop)
    base, *others = [read_report(path) for path in reports]
    rows, unmatched = [], []
    for path, report in zip(reports[1:], others, strict=True):
        for row in report.rows:
            counterpart = _counterpart(row, base)
            if counterpart is None:
                unmatched.append(f"{path}: {row.name}")
            else:
                rows.append(_compared(str(path), row, counterpart))
    gated = max_slowdown is not None or max_psnr_drop is not None
    failures = _failures(rows, reports[1:], max_slowdown, max_psnr_drop) if gated else []
    gate = ("failed" if failures else "passed") if gated else None
    return Comparison(tuple(rows), gate, tuple(failures), tuple(unmatched))


def latency_ratio_interval(latency: Latency, base: Latency) -> tuple[float, float]:
    """Confidence interval of `latency.median / base.median`.

    Both medians are resampled (bootstrap) from the recorded calls; a report that has only percentiles counts as
    log-normal with these percentiles. Deterministic: the generator is seeded.
    """
    generator = np.random.default_rng(0)
    spread = _relative_medians(latency, generator) / _relative_medians(base, generator)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(spread, [tail, 100 - tail]) * (latency.median / base.median)
    return float(low), float(high)


def _relative_medians(latency: Latency, generator: np.random.Generator) -> np.ndarray:
    """[RESAMPLES] medians of resampled calls, relative to the median of the calls."""
    calls = np.asarray(latency.samples_ms)
    if len(calls):
        picks = generator.integers(len(calls), size=(RESAMPLES, len(calls)))
        return np.median(calls[picks], axis=1) / np.median(calls)
    deviation = math.log(max(latency.p90 / latency.p10, 1.0)) / DECILES_OF_NORMAL
    return np.exp(generator.standard_normal(RESAMPLES) * MEDIAN_ERROR * deviation / math.sqrt(latency.n))


def _counterpart(row: Row, base: Report) -> Row | None:
    """The base row of the same name, or for a bundle the only bundle of the base."""
    for candidate in base.rows:
        if candidate.name == row.name and candidate.kind == row.kind:
            return candidate
    bundles = [candidate for candidate in base.rows if candidate.kind == "bundle"]
    return bundles[0] if row.kind == "bundle" and len(bundles) == 1 else None


def _compared(report: str, row: Row, base: Row) -> ComparedRow:
    known = row.psnr_db is not None and base.psnr_db is not None
    return ComparedRow(
        report=report,
        name=row.name,
        base_name=base.name,
        kind=row.kind,
        latency_ratio=row.latency_ms.median / base.latency_ms.median,
        latency_ratio_ci=latency_ratio_interval(row.latency_ms, base.latency_ms),
        psnr_change_db=row.psnr_db.mean - base.psnr_db.mean if known else None,  # type: ignore[union-attr]
        size_ratio=row.size_bytes / base.size_bytes if base.size_bytes else None,
    )


def _failures(
    rows: Sequence[ComparedRow], reports: Sequence[Path], max_slowdown: float | None, max_psnr_drop: float | None
) -> list[str]:
    """Why the gate fails. Bundles are judged, baselines are not: they belong to others."""
    bundles = [row for row in rows if row.kind == "bundle"]
    failures = [
        f"{path}: no bundle row to compare; it was not measured, or the base has none of its name."
        for path in reports
        if not any(row.report == str(path) for row in bundles)
    ]
    for row in bundles:
        failures += _row_failures(row, max_slowdown, max_psnr_drop)
    return failures


def _row_failures(row: ComparedRow, max_slowdown: float | None, max_psnr_drop: float | None) -> list[str]:
    where, found = f"{row.report}: {row.name}", []
    slowdown = 100 * (row.latency_ratio - 1)
    if max_slowdown is not None and slowdown > max_slowdown:
        found.append(f"{where}: expected at most {max_slowdown:g} % slower than the base; received {slowdown:.1f} %.")
    if max_psnr_drop is not None and row.psnr_change_db is None:
        found.append(f"{where}: expected a PSNR in both reports; run `stepfold bench` with --reference.")
    elif max_psnr_drop is not None and row.psnr_change_db is not None and -row.psnr_change_db > max_psnr_drop:
        found.append(
            f"{where}: expected at most {max_psnr_drop:g} dB below the base; received {-row.psnr_change_db:.2f} dB."
        )
    return found


def _check_limits(reports: Sequence[Path], max_slowdown: float | None, max_psnr_drop: float | None) -> None:
    if len(reports) < 2:
        raise UsageError(f"compare: expected a base and at least one other report; received {len(reports)}.")
    for name, limit in (("--max-slowdown", max_slowdown), ("--max-psnr-drop", max_psnr_drop)):
        if limit is not None and not (math.isfinite(limit) and limit >= 0):
            raise UsageError(f"{name}: expected a number from 0; received {limit:g}.")
