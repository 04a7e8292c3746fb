"""One recipe on three engines: a report of each, and one page that sets them side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import QUICK

from .conftest import Stepfold

pytestmark = pytest.mark.slow
ENGINES = ("onnxruntime", "openvino", "inductor")


@pytest.fixture
def reports(stepfold: Stepfold, tiny_checkpoint: Path, tmp_path: Path) -> list[Path]:
    """The reports of the recipe `fp32`, fitted and measured on each engine."""
    settings = [word for name, value in QUICK.items() for word in ("--set", f"schedule.{name}={value}")]
    found = []
    for engine in ENGINES:
        bundle, report = tmp_path / engine, tmp_path / f"{engine}_report"
        built = stepfold(
            "optimize", tiny_checkpoint, "--out", bundle, "--recipe", "fp32", "--backend", engine,
            "--min-psnr", "30", *settings,
        )  # fmt: skip
        if built.code == 2:
            pytest.skip(built.error)
        assert built.code == 0, built.err
        measured = stepfold(
            "bench", bundle, "--reference", tiny_checkpoint, "--count", "2", "--repeats", "2",
            "--quality-count", "4", "--out", report,
        )  # fmt: skip
        assert measured.code == 0, measured.err
        found.append(report)
    return found


def test_one_page(stepfold: Stepfold, reports: list[Path], tmp_path: Path) -> None:
    """The bundles have names of their own, and still meet as the only bundles of their reports."""
    page = tmp_path / "engines.html"
    result = stepfold("compare", *reports, "--out", page, "--json")
    assert result.code == 0, result.err
    rows = result.document()["rows"]
    assert [(row["base_name"], row["name"]) for row in rows] == [("onnxruntime", name) for name in ENGINES[1:]]
    assert all(abs(row["psnr_change_db"]) < 6 for row in rows)  # one recipe and one budget, fitted on each engine
    text = page.read_text()
    assert all(name in text for name in ENGINES)
    assert "<script src" not in text  # one file that needs no other
