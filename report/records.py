"""The report of `bench`: what `--json` prints and `report.json` holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ..loop.errors import UsageError
from ..loop.reading import Expected, read_json
from ..loop.spec import describe
from ..loop.writing import replacing

REPORT = "report.json"
LARGEST_REPORT_BYTES = 64 << 20
BENCH_REPORT = Expected("the JSON of `stepfold bench`", hint="Make it with `stepfold bench BUNDLE --out DIR`.")
LEAST_MS, MOST_MS = 1e-9, 1e15
Positive = Annotated[FiniteFloat, Field(gt=0), AfterValidator(lambda value: min(max(value, LEAST_MS), MOST_MS))]
"""Milliseconds that a clock can show, so that ratios of them are finite; what is outside counts as the nearest."""
Bytes = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Frozen; keys that a newer stepfold wrote are kept out of the way."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Latency(Record):
    """Wall clock of one call for `count` samples, in milliseconds; `samples_ms` are the `n` calls in order."""

    median: Positive
    p10: Positive
    p90: Positive
    n: Annotated[int, Field(gt=0)]
    samples_ms: tuple[Positive, ...] = ()


class Psnr(Record):
    """PSNR in dB against the reference.

    Attributes:
        mean: mean of the samples.
        min: worst sample.
        low: lower 95 % confidence bound of the mean; None in reports that were written before it was told.
        p05: 5th percentile of the samples; None as `low`.
    """

    mean: FiniteFloat
    min: FiniteFloat
    low: FiniteFloat | None = None
    p05: FiniteFloat | None = None


class Row(Record):
    """One engine.

    Attributes:
        name: folder name of a bundle, or the exact string that asked for a baseline.
        kind: `bundle` or `baseline`.
        latency_ms: latency of `count` samples at once, in milliseconds.
        speedup: latency of the row `eager` over this one, when it was asked for.
        evaluations: denoiser calls of one loop; None for a component.
        psnr_db: against the reference loop, None without one.
        ssim: mean over samples, None without a reference or for samples that are no images.
        drift: relative L2 error of all samples.
        size_bytes: files the engine needs to run.
        peak_memory_bytes: peak memory of its process, in bytes.
    """

    name: str
    kind: Literal["bundle", "baseline"]
    latency_ms: Latency
    speedup: FiniteFloat | None = None
    evaluations: int | None = None
    psnr_db: Psnr | None = None
    ssim: FiniteFloat | None = None
    drift: FiniteFloat | None = None
    size_bytes: Bytes
    peak_memory_bytes: Bytes


class Skipped(Record):
    """A row that could not be measured, and why."""

    name: str
    reason: str


class Protocol(Record):
    """How it was measured.

    Attributes:
        warmup: untimed calls of a row before the timed one of each of its turns.
        repeats: turns, and so timed calls, of each row.
        interleaved: whether the rows took turns.
        threads: number of threads of every row.
        count: samples of one timed call.
        quality_count: samples that quality is measured over.
        seed: seed of their noise.
        guidance: scale, None for a loop without guidance.
        reference: class and weights of the checkpoint quality is measured against, None without one.
    """

    warmup: int
    repeats: int
    interleaved: bool
    threads: int
    count: int | None = None
    quality_count: int | None = None
    seed: int | None = None
    guidance: FiniteFloat | None = None
    reference: Mapping[str, Any] | None = None


class Report(Record):
    """Everything `bench` found out."""

    protocol: Protocol
    machine: Mapping[str, Any]
    rows: tuple[Row, ...] = Field(min_length=1)
    skipped: tuple[Skipped, ...] = ()

    def document(self) -> dict[str, Any]:
        """The JSON object of `bench --json`."""
        return self.model_dump(mode="json")


def read_report(path: Path) -> Report:
    """Read the `report.json` of a bench, or the one in the folder given to `bench --out`.

    Raises:
        UsageError: there is none, or it is damaged, or it is another kind of file.
    """
    file = path / REPORT if os.path.isdir(path) else path
    data = read_json(file, BENCH_REPORT, LARGEST_REPORT_BYTES)
    if not isinstance(data, dict) or "rows" not in data or "protocol" not in data:
        keys = sorted(data)[:6] if isinstance(data, dict) else type(data).__name__
        raise UsageError(
            f"{file}: expected the report of `stepfold bench`, with protocol, machine and rows; received {keys}. "
            "The report.json inside a bundle is that of `stepfold optimize`: run `stepfold bench BUNDLE --out DIR`."
        )
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{file}: not a report of `stepfold bench`: {describe(error)}.") from None


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: readers see the old content or the new."""
    with replacing(path) as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.json` into a folder and return its path."""
    path = folder / REPORT
    write_text(path, json.dumps(report.document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path
