"""The report inside a bundle."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepfold.bundle import read
from stepfold.report import bundle_report
from stepfold.report.bundle_report import write_bundle_report
from stepfold.runtime.comparison import Pictures

SUMMARY: dict[str, Any] = {
    "bundle": "out/digits",
    "passes": [],
    "stages": [{"name": "embed", "flops": 10}, {"name": "step", "flops": 77_000}],
    "seconds": 3.5,
}


def test_report_and_page_belong_to_the_bundle(bundle_folder: Path) -> None:
    before = read(bundle_folder).manifest
    pictures = Pictures({"digits": np.zeros((2, 1, 8, 8), np.float32)})
    manifest = write_bundle_report(bundle_folder, before, SUMMARY, pictures)
    assert json.loads((bundle_folder / "report.json").read_text()) == SUMMARY
    html = (bundle_folder / "report.html").read_text()
    assert "stepfold optimize: digits" in html and "77 k" in html and "data:image/png" in html
    assert read(bundle_folder).manifest == manifest  # every hash is checked
    assert set(manifest.files) - set(before.files) == {"report.json", "report.html"}


def test_without_the_extra_only_the_json_is_written(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bundle_report, "missing_packages", lambda: "the page needs plotly: pip install it")
    with caplog.at_level(logging.WARNING):
        write_bundle_report(bundle_folder, read(bundle_folder).manifest, SUMMARY)
    assert not (bundle_folder / "report.html").exists()
    assert "report.json" in read(bundle_folder).manifest.files
    assert "report.html was not written: the page needs plotly: pip install it" in caplog.text
