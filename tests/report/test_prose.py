"""Numbers and sentences."""

from __future__ import annotations

import pytest

from stepfold.report import prose
from stepfold.report.records import Report

from .reports import report, row


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (prose.milliseconds, 0.4373, "0.437 ms"),
        (prose.milliseconds, 8.42, "8.42 ms"),
        (prose.milliseconds, 197.4, "197 ms"),
        (prose.milliseconds, 999.7, "1.00 s"),
        (prose.milliseconds, 4910, "4.91 s"),
        (prose.milliseconds, 12345, "12.3 s"),
        (prose.seconds, 0.42, "0.4 s"),
        (prose.seconds, 12.3, "12 s"),
        (prose.seconds, 200, "3 min 20 s"),
        (prose.size, 812, "812 B"),
        (prose.size, 7_245_076, "7.25 MB"),
        (prose.size, 1.31e9, "1.31 GB"),
        (prose.quantity, 6_120_000, "6.12 M"),
        (prose.quantity, 320, "320"),
        (prose.decibels, 40.24, "40.2 dB"),
        (prose.decibels, 126.02, "equal"),
        (prose.drift, 0.0, "0"),
        (prose.drift, 0.0112, "1.1 %"),
        (prose.drift, 3.2e-7, "3e-07"),
        (prose.times, 24.93, "24.9×"),
        (prose.times, 1.254, "1.25×"),
    ],
)
def test_numbers(function, value: float, text: str) -> None:
    assert function(value) == text


def sentences(*rows) -> list[str]:
    return prose.headlines(Report.model_validate(report(*rows)))


def test_headline_with_everything() -> None:
    (found,) = sentences(
        row("fast", 200.0, 40.2, speedup=24.5),
        row("eager", 4900.0, 126.0, "baseline", speedup=1.0),
        row("onnxruntime@17:ab2", 1000.0, 43.2, "baseline"),
        row("onnxruntime@13", 700.0, 35.0, "baseline"),
    )
    assert found == (
        "fast makes 10 samples in 200 ms, 24.5× as fast as eager PyTorch; its samples are 40.2 dB from those of the "
        "full loop (5th percentile 37.2 dB, worst 35.2 dB). The fastest baseline of at least its quality is onnxruntime@17:ab2 at "
        "1.00 s, 5.0× the time."
    )


def test_headline_admits_that_a_baseline_wins() -> None:
    (found,) = sentences(row("fast", 200.0, 40.2), row("openvino-int8@15:ab2", 150.0, 41.0, "baseline"))
    assert found.endswith("is openvino-int8@15:ab2 at 150 ms: that baseline wins.")


def test_headline_of_an_exact_bundle() -> None:
    (found,) = sentences(row("exact", 200.0, 117.0))
    assert "its samples are equal to those of the full loop" in found


def test_headline_without_a_reference_says_only_the_time() -> None:
    assert sentences(row("fast", 200.0)) == ["fast makes 10 samples in 200 ms."]


def test_headline_of_a_component() -> None:
    (found,) = sentences(row("text", 3.0, evaluations=None, drift=0.02))
    assert found == "text answers one call in 3 ms; its output differs by 2 % from that of the checkpoint."


def test_what_each_pass_cost() -> None:
    """The first measured pass has the model itself before it; exact passes are not measured and cost nothing."""
    passes = [{"psnr_db": value} for value in (None, 48.0, None, 46.5, 41.0)]
    assert prose.pass_costs(passes) == [None, None, None, 1.5, 5.5]
    assert prose.pass_costs([{}]) == [None] and prose.pass_costs([]) == []
