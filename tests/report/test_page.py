"""The HTML page: complete, self-contained, and whole when parts are missing."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepfold.loop.errors import UsageError
from stepfold.report import charts
from stepfold.report.compare import compare
from stepfold.report.page import build_page, comparison_page, describe_bundle, missing_packages
from stepfold.report.records import Report
from stepfold.runtime.comparison import Pictures

from .reports import manifest, report, row

SCRIPT = "/* plotly.js stands here */"
MODEL = {
    "loop": {},
    "class": "Tiny",
    "parameters": 200,
    "rates": [
        {"rate": "timestep", "parameters": 50, "flops": 1000},
        {"rate": "step", "parameters": 150, "flops": 9000},
    ],
    "sites": {"linear": 12, "attention": 0, "feed_forward": 2},
}


@pytest.fixture(autouse=True)
def without_plotly_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the five megabytes of plotly.js out of what is parsed here; one test looks at them."""
    monkeypatch.setattr(charts, "plotly_script", lambda: SCRIPT)


class Reader(HTMLParser):
    """Text, headings, and every address the page would load; unclosed or crossed elements are errors."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.text, self.addresses, self.headings = "", [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
            if self.open[-1] in ("h1", "h2", "h3"):
                self.headings.append(data)


def full() -> dict[str, Any]:
    return report(
        row("tiny", 200.0, 41.25, speedup=24.5),
        row("eager", 4900.0, 126.0, "baseline", speedup=1.0),
        row("onnxruntime@13", 700.0, 35.0, "baseline", speedup=7.0),
        row("onnxruntime@20", 1100.0, 40.0, "baseline", speedup=4.4),
        skipped=[{"name": "openvino", "reason": "needs openvino: pip install 'stepfold[openvino]'"}],
    )


def test_page_shows_every_section() -> None:
    first = {"tiny": np.zeros((2, 1, 8, 8)), "reference": np.ones((2, 1, 8, 8))}
    pictures = Pictures(first, {"tiny": np.zeros((2, 1, 8, 8))})
    reader = Reader(build_page("A bench", full(), [manifest()], pictures, MODEL))
    assert reader.headings == [
        "A bench",
        "Results",
        "Not measured",
        "Latency",
        "Quality over cost",
        "Samples",
        "The checkpoint",
        "tiny",
        "Schedule at guidance 2.0",
        "Passes",
        "Stages",
        "How it was measured",
    ]
    for text in (
        "tiny makes 10 samples in 200 ms, 24.5× as fast as eager PyTorch",
        "openvino: needs openvino: pip install 'stepfold[openvino]'",
        "3 of 8 calls are evaluated, from noise on the left to the sample on the right; 2 of them on both",
        "15 refused",
        "and 3 more, in the manifest",
        "from 6.12 M",
        "hidden_states, hidden_states, hidden_states, hidden_states and 2 more",
        "3 MB",  # the stage with its external data
        "Test CPU, 2 cores",
        "timestep",
        "25.0 %",  # 50 of 200 parameters
        "12 linear, 2 feed-forward",
    ):
        assert text in reader.text, text
    pictures_at = [address for address in reader.addresses if address.startswith("data:image/png")]
    assert len(pictures_at) == 3


def test_page_says_what_each_pass_cost() -> None:
    quantize = manifest()["passes"][0]
    schedule = {**quantize, "name": "schedule", "refused": [], "psnr_db": 41.5}
    text = Reader(build_page("A bench", full(), [manifest(passes=[{**quantize, "psnr_db": 47.25}, schedule])])).text
    assert "47.2 dB" in text and "41.5 dB" in text and "cost 5.8 dB" in text


def test_page_loads_nothing_from_anywhere() -> None:
    html = build_page("A bench", full(), [manifest()], Pictures({"tiny": np.zeros((1, 1, 8, 8))}))
    assert all(address.startswith("data:") for address in Reader(html).addresses)
    assert not re.search(r"@import|url\(", html)


def test_page_carries_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    html = build_page("A bench", full(), [])
    assert len(html) > 1_000_000
    assert "<script src" not in html


def test_page_draws_the_evaluated_calls() -> None:
    html = build_page("A bench", None, [manifest()])
    cells = re.findall(r'<rect class="(\w+)"', html)
    assert [i for i, kind in enumerate(cells) if kind == "evaluated"] == [0, 2, 5]
    assert len(cells) == 8


def test_page_of_an_optimize_has_a_headline_and_no_results() -> None:
    reader = Reader(build_page("optimize", None, [manifest()]))
    assert (
        "tiny is Tiny compiled for onnxruntime; it evaluates the denoiser 3 times for a loop of 8; its samples are "
        "41.2 dB from those of the full loop (5th percentile 33.0 dB, worst 30.0 dB, over 64 held-out samples)."
        in reader.text
    )
    assert "Results" not in reader.headings and "How it was measured" not in reader.headings


def test_page_of_an_optimize_plots_what_the_search_tried() -> None:
    tried = [{"origin": "fitted", "evaluations": n, "validation_psnr_db": 30.0 + n} for n in (4, 6)]
    entry = {**manifest()["passes"][0], "details": {"2.0": {"chosen": tried[1], "tried": tried}}}
    reader = Reader(build_page("optimize", None, [manifest(passes=[entry])]))
    assert "What the schedule search measured" in reader.headings


@pytest.mark.parametrize(
    "tried", [5, [{}], ["x"], [{"origin": "a", "evaluations": 1}], [{"origin": 1, "evaluations": "x"}]]
)
def test_details_of_another_form_are_not_drawn(tried: object, caplog: pytest.LogCaptureFixture) -> None:
    entry = {**manifest()["passes"][0], "details": {"2.0": {"chosen": 5, "tried": tried}}}
    assert build_page("tiny", None, [manifest(passes=[entry])])
    assert "what the search of scale 2.0 tried is not shown" in caplog.text


def test_page_of_a_component_without_a_reference() -> None:
    component = manifest(loop=None, quality=None, schedule=None, schedule_file=None, passes=[])
    reader = Reader(build_page("A bench", report(row("tiny", 3.0, evaluations=None)), [component]))
    assert "It is a component: it runs once, without a loop." in reader.text
    assert "Quality over cost" not in reader.headings
    assert not any("Schedule" in heading for heading in reader.headings)


def test_samples_that_are_no_images_are_left_out() -> None:
    reader = Reader(build_page("A bench", full(), [], Pictures({"tiny": np.zeros((2, 4, 8, 8))})))
    assert "Samples" not in reader.headings


def test_names_are_escaped() -> None:
    name = "<script>alert(1)</script>"
    html = build_page(
        name, report(row(name, 10.0, 40.0)), [manifest(name=name)], Pictures({name: np.zeros((1, 1, 8, 8))})
    )
    assert "<script>alert" not in html
    assert name in Reader(html).text


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "plotly" else found(name, *a))
    assert missing_packages() == "the page needs plotly: pip install 'stepfold[report]'"


def test_rendering_without_the_extra_is_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfold.report.page.missing_packages", lambda: "the page needs jinja2: pip install it")
    with pytest.raises(UsageError, match="the page needs jinja2"):
        build_page("A bench", None, [manifest()])


def test_families_join_rows_that_differ_in_steps_only() -> None:
    rows = Report.model_validate(
        report(
            row("onnxruntime", 100.0, 126.0, "baseline"),
            row("onnxruntime@13", 30.0, 35.0, "baseline"),
            row("onnxruntime@13:ab2", 31.0, 40.0, "baseline"),
            row("onnxruntime@13", 5.0, 40.0),  # a bundle in a folder of that name
            row("eager", 200.0, 126.0, "baseline"),
        )
    ).rows
    found = {name: [member.latency_ms.median for member in members] for name, members in charts.families(rows).items()}
    assert found == {
        "onnxruntime": [30.0, 100.0],
        "onnxruntime · ab2": [31.0],
        "onnxruntime@13": [5.0],
        "eager": [200.0],
    }


def test_rows_that_equal_the_reference_are_drawn_just_above_the_others() -> None:
    rows = Report.model_validate(full()).rows
    figure = charts.quality_over_cost(rows)
    assert figure is not None
    assert re.search(r'"ticktext":\["35","40","equal"\]', figure)
    assert "45.25" in figure  # 41.25, the best that is not equal, plus 4 dB of room
    assert "126" not in re.sub(r"customdata.*?\]\]", "", figure)


def test_bundle_is_described_with_schedule_and_flops(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    content = {key: value for key, value in manifest().items() if key not in ("name", "schedule_file")}
    (folder / "manifest.json").write_text(json.dumps(content))
    assert describe_bundle(folder)["schedule_file"] is None
    (folder / "schedule.json").write_text(json.dumps(manifest()["schedule_file"]))
    described = describe_bundle(folder, {"stages": [{"name": "step", "flops": 123_000_000}]})
    assert (described["name"], described["schedule_file"]["grid_steps"]) == ("tiny", 8)
    assert "123 M" in Reader(build_page("optimize", None, [described])).text


def test_what_stages_share_counts_for_none_of_them() -> None:
    described = manifest()
    assert "share count" not in Reader(build_page("optimize", None, [described])).text
    described["files"]["stages/shared.weights"] = {"sha256": "", "bytes": 5_000_000}
    described["shared"] = {
        "file": "stages/shared.weights",
        "stages": ["step", "step_1"],
        "saved_bytes": 4_000_000,
    }
    text = Reader(build_page("optimize", None, [described])).text
    assert "Weights that step, step_1 share count for none of them" in text
    assert "stored once, in 5 MB, which saves 4 MB" in text and "3 MB" in text


def test_comparison_page(tmp_path: Path) -> None:
    reports = {"base.json": full(), "new.json": report(row("tiny", 300.0, 41.0), row("other", 1.0, kind="baseline"))}
    paths = []
    for name, content in reports.items():
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(content))
    comparison = compare(paths, max_slowdown=5.0)
    parsed = {name: Report.model_validate(content) for name, content in reports.items()}
    reader = Reader(comparison_page("base and new", comparison, parsed))
    for text in ("failed", "expected at most 5 % slower than the base; received 50.0 %", "1.500×", "-0.25 dB", "other"):
        assert text in reader.text, text
    assert all(address.startswith("data:") for address in reader.addresses)
