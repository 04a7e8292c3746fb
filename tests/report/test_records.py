"""Reading and writing `report.json`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stepfold.loop.errors import UsageError
from stepfold.report.records import LEAST_MS, MOST_MS, Report, read_report, write_report

from .reports import report, row


def test_report_survives_writing_and_reading(tmp_path: Path) -> None:
    written = Report.model_validate(report(row("a", 10.0, 40.0), row("eager", 90.0, 126.0, "baseline", speedup=1.0)))
    path = write_report(written, tmp_path / "made" / "here")
    assert path == tmp_path / "made" / "here" / "report.json"
    assert read_report(path) == read_report(path.parent) == written
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]


def test_document_has_the_keys_of_the_interface() -> None:
    document = Report.model_validate(report(row("a", 10.0, 40.0))).document()
    assert set(document) == {"protocol", "machine", "rows", "skipped"}
    assert {"warmup", "repeats", "interleaved", "threads"} <= set(document["protocol"])
    assert set(document["rows"][0]) == {
        "name",
        "kind",
        "latency_ms",
        "speedup",
        "evaluations",
        "psnr_db",
        "ssim",
        "drift",
        "size_bytes",
        "peak_memory_bytes",
    }
    assert {"median", "p10", "p90", "n"} <= set(document["rows"][0]["latency_ms"])
    assert set(document["rows"][0]["psnr_db"]) == {"mean", "min", "low", "p05"}


def test_keys_of_a_newer_stepfold_do_not_disturb(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report(row("a", 10.0, energy_joules=3), future=1)))
    assert read_report(tmp_path).rows[0].name == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected the JSON of `stepfold bench`"),
        ("[1, 2]", "with protocol, machine and rows; received list"),
        ('{"passes": [], "bundle": "b"}', "The report.json inside a bundle is that of `stepfold optimize`"),
        (json.dumps(report(row("a", float("nan")))), "no usable JSON: the number NaN"),
        (
            json.dumps(report(row("a", 0.0))),
            "rows.0.latency_ms.median: Input should be greater than 0",
        ),
        (json.dumps(report({"name": "a", "kind": "bundle"})), "rows.0.latency_ms: Field required"),
        (json.dumps(report(row("a", 1.0, kind="other"))), "rows.0.kind"),
    ],
)
def test_damaged_report_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_report(path)


@pytest.mark.parametrize(("median", "counted"), [(5e-324, LEAST_MS), (1e308, MOST_MS)])
def test_a_time_that_no_clock_shows_counts_as_the_nearest(tmp_path: Path, median: float, counted: float) -> None:
    content = report(row("a", 1.0))
    content["rows"][0]["latency_ms"] |= {"median": median, "samples_ms": [median]}
    (tmp_path / "report.json").write_text(json.dumps(content))
    (found,) = read_report(tmp_path).rows
    assert found.latency_ms.median == found.latency_ms.samples_ms[0] == counted and np.isfinite(MOST_MS / LEAST_MS)


def test_binary_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.npy").write_bytes(b"\x93NUMPY\xff\xfe")
    with pytest.raises(UsageError, match="expected the JSON"):
        read_report(tmp_path / "noise.npy")
    with pytest.raises(UsageError, match=r"there is no such file\. Make it with `stepfold bench BUNDLE --out DIR`"):
        read_report(tmp_path / "nothing.json")
    with pytest.raises(UsageError, match="there is no such file"):
        read_report(tmp_path)
