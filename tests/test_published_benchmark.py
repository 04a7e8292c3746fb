"""`benchmarks/published.py`: folders through the command line, and what their rows say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks" / "published.py"
CHECKPOINTS = sorted(path.stem for path in (ROOT / "benchmarks" / "published").glob("*.json"))
SOME = "^(ddpm-butterflies-128|flux.1-dev|stable-diffusion-v1-5)$"


@pytest.fixture(scope="module")
def published() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("published", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module
    sys.path.insert(0, str(FILE.parent))  # as for a program that is run
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FILE.parent))


ANSWER = {"pipeline": "SomePipeline", "runs": "", "call": {}}


def document(latent: float, image: float | None, quality: float) -> str:
    proof = {"latent_db": latent, "image_db": image, "samples": 2}
    return json.dumps({"proof": proof, "quality": {"psnr_db": {"mean": 126.0, "min": quality, "low": 126.0}}})


@pytest.mark.parametrize(
    ("figures", "outcome"),
    [
        ((120.0, 110.0, 126.0), "exact"),
        ((120.0, None, 126.0), "exact"),
        ((120.0, 70.0, 126.0), "wrong"),
        ((120.0, None, 80.0), "wrong"),
    ],
)
def test_a_bundle_is_exact_in_everything_or_wrong(published: Any, figures: Any, outcome: str) -> None:
    row = published.row_of("a", ANSWER, 0, document(*figures), "")
    assert (row.outcome, row.latent_db, row.image_db, row.quality_db) == (outcome, *figures)


def test_a_bundle_without_a_proof_is_not_exact(published: Any) -> None:
    row = published.row_of("a", ANSWER, 0, json.dumps({"proof": None, "quality": None}), "")
    assert row.outcome == "wrong"


@pytest.mark.parametrize(("code", "outcome"), [(2, "refused"), (1, "failed")])
def test_a_folder_without_a_bundle_has_its_reason(published: Any, code: int, outcome: str) -> None:
    row = published.row_of("a", ANSWER, code, "", "info: keys\nerror: it adds noise | in its steps\nmore")
    assert (row.outcome, row.reason) == (outcome, "it adds noise | in its steps")
    assert "it adds noise \\| in its steps" in published.table([row])


def test_the_share_is_of_folders_that_run(published: Any) -> None:
    rows = [
        published.row_of("a", ANSWER, 0, document(120.0, None, 126.0), ""),
        published.row_of("b", ANSWER, 2, "", "error: no"),
        published.row_of("c", ANSWER | {"runs": "ImportError: gone"}, 2, "", "error: no"),
    ]
    assert published.table(rows).endswith(
        "3 folders, 2 run in diffusers: 1 exact, 0 wrong, 1 refused, 0 failed (50 % exact)."
    )


def test_a_call_is_given_by_options(published: Any) -> None:
    call = published.small_call(diffusers.WanPipeline, 4, 64)
    words = published.words(call | {"use_resolution_binning": False})
    assert words == [
        "--steps",
        "4",
        "--height",
        "64",
        "--width",
        "64",
        "--frames",
        "9",
        "--call",
        "use_resolution_binning=false",
    ]
    assert published.small_call(diffusers.DDIMPipeline, 4, 64) == {"num_inference_steps": 4}


def test_the_page_has_a_row_for_each_checkpoint() -> None:
    page = (ROOT / "docs" / "published.md").read_text()
    rows = [
        row.strip("|").split(" | ") for row in re.findall(r"^\| [\w.-]+ \| \w+Pipeline \|.*\|$", page, re.MULTILINE)
    ]
    assert [row[0].strip() for row in rows] == CHECKPOINTS
    exact = sum(row[3] == "exact" for row in rows if row[2] == "yes")
    running = sum(row[2] == "yes" for row in rows)
    assert f"{len(rows)} folders, {running} run in diffusers: {exact} exact, 0 wrong" in page
    assert f"configurations of {len(rows)} published checkpoints" in page


@pytest.mark.slow
def test_published_checkpoints(
    published: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two that become exact bundles and one that is refused; what is known is not run again."""
    monkeypatch.setattr(published, "MADE", tmp_path / "made")
    words = ["--only", SOME, "--rows", str(tmp_path / "rows.jsonl"), "--steps", "3"]
    assert published.main(words) == 0
    shown = capsys.readouterr().out
    assert "3 folders, 3 run in diffusers: 2 exact, 0 wrong, 1 refused, 0 failed (67 % exact)." in shown
    assert "it clips the predicted sample" in shown
    assert published.main(words) == 0 and capsys.readouterr().out == shown
