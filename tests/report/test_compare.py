"""The maths and the gate of `compare`, on literal numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import check

from stepfold.loop.errors import UsageError
from stepfold.report.compare import RESAMPLES, compare, latency_ratio_interval
from stepfold.report.records import Latency

from .reports import report, row


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_report(name: str, *rows: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(report(*rows)))
        return path

    return write_report


def test_ratios_against_the_row_of_the_same_name(write: Any) -> None:
    base = write("base", row("a", 100.0, 40.0), row("eager", 1000.0, 126.0, "baseline"))
    other = write("other", row("a", 125.0, 39.5, size_bytes=1500), row("eager", 900.0, 126.0, "baseline"))
    found = compare([base, other])
    first, second = found.rows
    assert (first.report, first.name, first.base_name, first.kind) == (str(other), "a", "a", "bundle")
    assert first.latency_ratio == 1.25  # 125 / 100
    assert first.psnr_change_db == -0.5  # 39.5 - 40
    assert first.size_ratio == 1.5  # 1500 / 1000
    assert second.latency_ratio == 0.9  # 900 / 1000
    assert found.gate is None and found.failures == () and found.unmatched == ()


def test_a_bundle_of_another_name_meets_the_only_bundle_of_the_base(write: Any) -> None:
    base = write("base", row("before", 100.0), row("eager", 1000.0, kind="baseline"))
    other = write("other", row("after", 50.0), row("compile", 800.0, kind="baseline"))
    found = compare([base, other])
    assert [(r.name, r.base_name, r.latency_ratio) for r in found.rows] == [("after", "before", 0.5)]
    assert found.unmatched == (f"{other}: compile",)


def test_among_two_bundles_of_the_base_only_the_name_decides(write: Any) -> None:
    base = write("base", row("a", 100.0), row("b", 200.0))
    other = write("other", row("b", 100.0), row("c", 100.0))
    found = compare([base, other])
    assert [(r.name, r.base_name, r.latency_ratio) for r in found.rows] == [("b", "b", 0.5)]
    assert found.unmatched == (f"{other}: c",)


def test_a_baseline_and_a_bundle_of_one_name_are_not_compared(write: Any) -> None:
    base = write("base", row("eager", 1000.0, kind="baseline"), row("a", 100.0))
    other = write("other", row("eager", 50.0))  # a bundle in a folder called eager
    assert [r.base_name for r in compare([base, other]).rows] == ["a"]


def test_document_has_the_keys_of_the_interface(write: Any) -> None:
    base = write("base", row("a", 100.0, 40.0))
    document = json.loads(json.dumps(compare([base, base], 5.0).document()))
    assert document["gate"] == "passed"
    assert {"report", "name", "latency_ratio", "latency_ratio_ci", "psnr_change_db", "size_ratio"} <= set(
        document["rows"][0]
    )
    assert len(document["rows"][0]["latency_ratio_ci"]) == 2


@pytest.mark.parametrize(
    ("median", "limit", "gate"), [(104.0, 5.0, "passed"), (106.0, 5.0, "failed"), (90.0, 0.0, "passed")]
)
def test_latency_gate(write: Any, median: float, limit: float, gate: str) -> None:
    found = compare([write("base", row("a", 100.0)), write("other", row("a", median))], max_slowdown=limit)
    assert found.gate == gate
    if gate == "failed":
        assert "expected at most 5 % slower than the base; received 6.0 %" in found.failures[0]


@pytest.mark.parametrize(("psnr", "gate"), [(39.9, "passed"), (39.7, "failed"), (44.0, "passed")])
def test_quality_gate(write: Any, psnr: float, gate: str) -> None:
    found = compare([write("base", row("a", 100.0, 40.0)), write("other", row("a", 100.0, psnr))], max_psnr_drop=0.2)
    assert found.gate == gate
    if gate == "failed":
        assert "expected at most 0.2 dB below the base; received 0.30 dB" in found.failures[0]


def test_a_baseline_that_got_slower_does_not_fail_the_gate(write: Any) -> None:
    base = write("base", row("a", 100.0), row("eager", 1000.0, kind="baseline"))
    other = write("other", row("a", 100.0), row("eager", 3000.0, kind="baseline"))
    assert compare([base, other], max_slowdown=5.0).gate == "passed"


def test_a_bundle_that_was_not_measured_fails_the_gate(write: Any) -> None:
    base = write("base", row("a", 100.0), row("eager", 1000.0, kind="baseline"))
    other = write("other", row("eager", 1000.0, kind="baseline"))
    found = compare([base, other], max_slowdown=5.0)
    assert found.gate == "failed" and "no bundle row to compare" in found.failures[0]


def test_a_missing_psnr_fails_the_quality_gate(write: Any) -> None:
    found = compare([write("base", row("a", 100.0, 40.0)), write("other", row("a", 100.0))], max_psnr_drop=1.0)
    assert found.gate == "failed" and "run `stepfold bench` with --reference" in found.failures[0]
    assert found.rows[0].psnr_change_db is None


def test_three_reports_are_each_compared_with_the_first(write: Any) -> None:
    paths = [write(name, row("a", median)) for name, median in (("one", 100.0), ("two", 200.0), ("three", 50.0))]
    assert [r.latency_ratio for r in compare(paths).rows] == [2.0, 0.5]


def test_interval_of_calls_without_spread_is_the_ratio() -> None:
    steady = Latency(median=10.0, p10=10.0, p90=10.0, n=4, samples_ms=(10.0,) * 4)
    slower = Latency(median=12.0, p10=12.0, p90=12.0, n=4, samples_ms=(12.0,) * 4)
    assert latency_ratio_interval(slower, steady) == pytest.approx((1.2, 1.2))


def test_interval_is_the_percentiles_of_resampled_medians() -> None:
    calls = (9.0, 10.0, 11.0)
    noisy = Latency(median=10.0, p10=9.2, p90=10.8, n=3, samples_ms=calls)
    steady = Latency(median=10.0, p10=10.0, p90=10.0, n=3, samples_ms=(10.0,) * 3)
    # A median of three draws is 9 when two or three of them are: 3 (1/3)^2 (2/3) + (1/3)^3 = 7/27 > 2.5 %.
    assert latency_ratio_interval(noisy, steady) == pytest.approx((0.9, 1.1))
    generator = np.random.default_rng(1)
    nines = np.median(generator.choice(calls, size=(RESAMPLES, 3)), axis=1) == 9.0
    assert nines.mean() == pytest.approx(7 / 27, abs=0.03)


def test_interval_follows_the_stated_medians() -> None:
    calls = tuple(np.linspace(9.5, 10.5, 21))
    base = Latency(median=10.0, p10=9.6, p90=10.4, n=21, samples_ms=calls)
    scaled = base.model_copy(update={"median": 15.0})  # edited by hand: the spread stays, the place moves
    low, high = latency_ratio_interval(scaled, base)
    assert low < 1.5 < high and 1.4 < low and high < 1.6


def test_interval_from_percentiles_alone_narrows_with_more_calls() -> None:
    few = Latency(median=10.0, p10=9.0, p90=11.0, n=5)
    many = few.model_copy(update={"n": 500})
    low_few, high_few = latency_ratio_interval(few, few)
    low_many, high_many = latency_ratio_interval(many, many)
    assert low_few < low_many < 1.0 < high_many < high_few


@pytest.mark.parametrize(
    ("reports", "limits", "message"),
    [
        (1, {}, "expected a base and at least one other report; received 1"),
        (2, {"max_slowdown": -1.0}, "--max-slowdown: expected a number from 0; received -1"),
        (2, {"max_psnr_drop": float("nan")}, "--max-psnr-drop: expected a number from 0; received nan"),
    ],
)
def test_wrong_use(write: Any, reports: int, limits: dict[str, float], message: str) -> None:
    base = write("base", row("a", 100.0))
    with pytest.raises(UsageError, match=message):
        compare([base] * reports, **limits)


def test_changed_reports_are_compared_or_refused(tmp_path: Path) -> None:
    good = report(row("bundle", 10.0, 40.0), row("eager", 30.0, kind="baseline"))

    def use(document: Any) -> None:
        for name, content in (("a", document), ("b", good)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "report.json").write_text(json.dumps(content))
        compare([tmp_path / "a", tmp_path / "b"], 5.0, 1.0).document()

    check(good, use)


@pytest.mark.parametrize("median", [0, -1.0])
def test_times_that_no_clock_shows_are_refused(tmp_path: Path, median: float) -> None:
    document = report(row("bundle", 10.0))
    document["rows"][0]["latency_ms"]["median"] = median
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"rows\.0\.latency_ms\.median"):
        compare([tmp_path, tmp_path], None, None)
