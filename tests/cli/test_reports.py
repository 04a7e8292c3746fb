"""`bench` and `compare`: what they pass on, print and answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from stepfold.loop.errors import UsageError
from stepfold.report.records import Report

from ..report.reports import report, row

FULL = report(
    row("tiny", 25.0, 41.0, speedup=8.0),
    row("eager", 200.0, kind="baseline", psnr=126.0),
    skipped=[{"name": "openvino", "reason": "needs [openvino]"}],
)


@pytest.fixture
def write(tmp_path: Path):
    def save(name: str, median: float, psnr: float | None = 41.0) -> Path:
        file = tmp_path / name / "report.json"
        file.parent.mkdir()
        file.write_text(json.dumps(report(row("tiny", median, psnr))))
        return file

    return save


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A bench that measures nothing; the list fills with its arguments."""
    calls: list[dict[str, Any]] = []

    def bench(bundles: list[Path], **options: Any) -> Report:
        calls.append({"bundles": bundles, **options})
        return Report.model_validate(FULL)

    monkeypatch.setattr("stepfold.report.bench.bench", bench)
    return calls


def test_bench_passes_its_options_on(stepfold, measured: list[dict[str, Any]], cache_of_this_run: Path) -> None:
    words = "a b --reference c --baselines eager,onnxruntime@13:ab2 --count 10 --repeats 3 --seed 5 --out d --json"
    result = stepfold("bench", *words.split())
    assert result.document() == Report.model_validate(FULL).document()
    (call,) = measured
    progress = call.pop("progress")
    assert callable(progress)
    assert call == {
        "bundles": [Path("a"), Path("b")],
        "reference": Path("c"),
        "baselines": ["eager", "onnxruntime@13:ab2"],
        "count": 10,
        "quality_count": 64,
        "repeats": 3,
        "seed": 5,
        "out": Path("d"),
        "cache": cache_of_this_run,
        "allow_native": False,
    }


@pytest.mark.parametrize("with_page", [True, False])
def test_bench_as_text(stepfold, measured: list[dict[str, Any]], tmp_path: Path, with_page: bool) -> None:
    """The page is named where there is one: it needs the extra `report`."""
    if with_page:
        (tmp_path / "report.html").touch()
    result = stepfold("bench", "a", "--out", tmp_path)
    assert result.code == 0
    named = f"{tmp_path}/report.{'html' if with_page else 'json'}"
    for text in ("25.0", "8.0x", "41.00", "eager", "skipped openvino: needs [openvino]", named):
        assert text in result.out
    assert measured[0]["baselines"] == []


def test_bench_refuses_wrong_use(stepfold, read_only_bundle: Path, tmp_path: Path) -> None:
    result = stepfold("bench", read_only_bundle, "--baselines", "eager", "--out", tmp_path / "out")
    assert (result.code, result.error.startswith("--baselines: they run the checkpoint")) == (2, True)
    result = stepfold("bench", tmp_path / "none")
    assert (result.code, "there is none" in result.error) == (2, True)
    assert not (tmp_path / "out").exists()


def test_compare(stepfold, write) -> None:
    base, other = write("base", 100.0), write("other", 80.0)
    document = stepfold("compare", base, other.parent, "--json").document()
    (compared,) = document["rows"]
    keys = {"report", "name", "latency_ratio", "latency_ratio_ci", "psnr_change_db", "size_ratio"}
    assert keys <= compared.keys()
    assert compared["latency_ratio"] == pytest.approx(0.8)
    assert document["gate"] is None
    text = stepfold("compare", base, other).out
    assert "0.800x" in text and "+0.00 dB" in text and "Gate" not in text


@pytest.mark.parametrize(
    ("limits", "code", "gate"),
    [
        (("--max-slowdown", "25"), 0, "passed"),
        (("--max-slowdown", "15"), 3, "failed"),
        (("--max-psnr-drop", "0.5"), 3, "failed"),
        (("--max-psnr-drop", "2"), 0, "passed"),
    ],
)
def test_the_gate_is_an_exit_code(stepfold, write, limits: tuple[str, str], code: int, gate: str) -> None:
    words = ("compare", write("base", 100.0), write("other", 120.0, 40.0), *limits)
    result = stepfold(*words, "--json")
    assert (result.code, result.document()["gate"]) == (code, gate)
    result = stepfold(*words)
    assert (result.code, f"Gate: {gate}" in result.out) == (code, True)
    assert ("failed: " in result.out) == (code == 3)


def test_compare_writes_a_page(stepfold, write, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page = tmp_path / "new" / "page.html"
    assert stepfold("compare", write("base", 100.0), write("other", 80.0), "--out", page).code == 0
    assert "<html" in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none.json", "none.json"), "none.json: expected the JSON of `stepfold bench`; there is no such file."),
        (("none.json",), "compare: expected a base and at least one other report; received 1."),
        (("a", "b", "--out", "page.pdf"), "--out: expected a file that ends in .html; received page.pdf."),
        (("a", "b", "--max-slowdown", "-1"), "--max-slowdown: expected a number from 0; received -1."),
    ],
)
def test_compare_refuses_wrong_use(stepfold, words: tuple[str, ...], message: str) -> None:
    result = stepfold("compare", *words)
    assert (result.code, result.error.startswith(message)) == (2, True)


def test_a_page_without_its_packages(stepfold, write, monkeypatch, tmp_path: Path) -> None:
    def missing(*_: object) -> str:
        raise UsageError("the page needs plotly: pip install 'stepfold[report]'")

    monkeypatch.setattr("stepfold.report.page.comparison_page", missing)
    words = ("compare", write("base", 100.0), write("other", 80.0), "--out", tmp_path / "page.html")
    result = stepfold(*words)
    assert (result.code, "stepfold[report]" in result.error) == (2, True)
    assert not (tmp_path / "page.html").exists()
