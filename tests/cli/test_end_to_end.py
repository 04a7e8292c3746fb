"""From a checkpoint to a compared report, each command in a process of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import QUICK
from commands import NOT_OF_THE_CORE, command


@pytest.mark.slow
def test_from_checkpoint_to_comparison(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle, reports = tmp_path / "bundle", tmp_path / "reports"
    search = [word for name, value in QUICK.items() for word in ("--set", f"schedule.{name}={value}")]
    words = ("optimize", tiny_checkpoint, "--out", bundle, "--recipe", "fp32", "--min-psnr", 30, *search, "--json")
    optimized = json.loads(command(*words))
    assert optimized["quality"]["psnr_db"]["low"] > 28  # met on validation samples, reported on held-out ones

    words = ("generate", bundle, "--npy", tmp_path / "a.npy", "--out", tmp_path / "a.png", "--count", 6, "--seed", 7)
    command(*words, blocked=NOT_OF_THE_CORE)
    assert np.load(tmp_path / "a.npy").shape == (6, 1, 8, 8)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(command("verify", bundle, "--json", blocked=NOT_OF_THE_CORE)) == {
        "ok": True,
        "problems": [],
        "not_checked_here": [],
    }

    words = ("bench", bundle, "--reference", tiny_checkpoint, "--baselines", "eager", "--count", 2)
    for seed in (1, 2):
        few = ("--quality-count", 8, "--repeats", 2, "--seed", seed, "--out", reports / str(seed), "--json")
        measured = json.loads(command(*words, *few))
        assert [row["name"] for row in measured["rows"]] == ["bundle", "eager"]
        assert measured["rows"][0]["evaluations"] == optimized["schedule"]["evaluations"]
        assert measured["rows"][0]["psnr_db"]["mean"] > 25
        assert measured["rows"][1]["psnr_db"]["mean"] > 100

    words = ("compare", reports / "1", reports / "2", "--max-psnr-drop", 20, "--json")
    compared = json.loads(command(*words, blocked=NOT_OF_THE_CORE))
    assert compared["gate"] == "passed"
    assert {row["name"] for row in compared["rows"]} == {"bundle", "eager"}
