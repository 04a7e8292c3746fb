"""What `inspect` says about a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calibrated import CALLS, TOKENS, calibrated, standard
from mutations import check

from stepfold.calibration.document import STATISTICS, STORE
from stepfold.calibration.read import SiteStatistics, open_finished
from stepfold.calibration.shards import shard_name
from stepfold.calibration.summary import plan_bytes, store_summary
from stepfold.cli.inspect_store import print_store
from stepfold.loop.errors import StepfoldError

SAMPLES = 20


@pytest.fixture
def store(tmp_path: Path) -> Path:
    calibrated(standard(), tmp_path, SAMPLES, buckets=2)
    return tmp_path


def test_a_finished_store(store: Path) -> None:
    found = store_summary(store)
    assert found["finished"] and found["shards"] == {"done": 3, "total": 3}
    assert found["coverage"][0] == {
        "bucket": 0,
        "calls": [0, 1],
        "timesteps": [1000.0, 750.0],
        "branch": "conditional",
        "evaluations": SAMPLES * 2,
    }
    assert [(row["bucket"], row["branch"]) for row in found["coverage"]] == [
        (bucket, branch) for bucket in (0, 1) for branch in ("conditional", "unconditional")
    ]
    (second,) = [site for site in found["sites"] if site["site"] == "second"]
    statistics = open_finished(store).site("second")
    assert second["rows"] == second["gram_rows"] == SAMPLES * TOKENS * CALLS * 2
    assert (second["low"], second["high"]) == (float(statistics.low().min()), float(statistics.high().max()))
    assert second["drift"] == statistics.drift() >= 1 and second["ranges"] == statistics.ranges().tolist()
    assert [layer["path"] for layer in second["layers"]] == ["second"]
    json.dumps(found, allow_nan=False)


def test_an_unfinished_store_covers_what_was_collected(store: Path) -> None:
    (store / shard_name(0)).unlink()
    (store / STATISTICS).unlink()
    document = json.loads((store / STORE).read_text()) | {"finished": False, "files": {}}
    (store / STORE).write_text(json.dumps(document))
    found = store_summary(store)
    assert not found["finished"] and found["shards"] == {"done": 2, "total": 3}
    assert {row["evaluations"] for row in found["coverage"]} == {(SAMPLES - 8) * 2}
    assert all(site["rows"] is None and site["drift"] is None and site["width"] > 0 for site in found["sites"])


def test_a_truncated_shard_is_named(store: Path) -> None:
    path = store / shard_name(1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StepfoldError, match=rf"^{path}: .*Delete it or run `stepfold calibrate` again"):
        store_summary(store)


def test_an_infinite_drift_is_null(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiteStatistics, "drift", lambda self: float("inf"))
    assert {site["drift"] for site in store_summary(store)["sites"]} == {None}


def test_bytes_of_the_plan(store: Path) -> None:
    document = open_finished(store).document
    sizes = plan_bytes(document)
    parts = ("accumulators", "gram", "rows", "activations")
    assert sizes["planned"] == sum(sizes[name] for name in parts)
    files = [path.read_bytes() for path in store.rglob("*.safetensors")]
    on_disk = sum(len(file) - 8 - int.from_bytes(file[:8], "little") for file in files)  # tensors without their header
    assert on_disk <= sizes["disk"] * 1.1 and sizes["disk"] <= on_disk * 1.5


def test_changed_documents_are_shown_or_refused(store: Path) -> None:
    def use(document: object) -> None:
        (store / STORE).write_text(json.dumps(document))
        print_store(store_summary(store))

    check(json.loads((store / STORE).read_text()), use)
