"""From a checkpoint to a compared report, each command in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import QUICK

WITHOUT_TORCH = """
import sys
for name in ("torch", "onnx", "onnxscript", "diffusers", "transformers"):
    sys.modules[name] = None
from stepfold.cli import main
sys.exit(main())
"""


def stepfold(*words: Any, torch: bool = True) -> str:
    """Run a command in a process of its own and return all of its standard output."""
    program = ["-m", "stepfold"] if torch else ["-c", WITHOUT_TORCH]
    command = [sys.executable, *program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_from_checkpoint_to_comparison(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle, reports = tmp_path / "bundle", tmp_path / "reports"
    search = [word for name, value in QUICK.items() for word in ("--set", f"schedule.{name}={value}")]
    words = ("optimize", tiny_checkpoint, "--out", bundle, "--recipe", "fp32", "--min-psnr", 30, *search, "--json")
    optimized = json.loads(stepfold(*words))
    assert optimized["quality"]["psnr_db"]["low"] > 28  # met on validation samples, reported on held-out ones

    words = ("generate", bundle, "--npy", tmp_path / "a.npy", "--out", tmp_path / "a.png", "--count", 6, "--seed", 7)
    stepfold(*words, torch=False)
    assert np.load(tmp_path / "a.npy").shape == (6, 1, 8, 8)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(stepfold("verify", bundle, "--json", torch=False)) == {
        "ok": True,
        "problems": [],
        "not_checked_here": [],
    }

    words = ("bench", bundle, "--reference", tiny_checkpoint, "--baselines", "eager", "--count", 2)
    for seed in (1, 2):
        few = ("--quality-count", 8, "--repeats", 2, "--seed", seed, "--out", reports / str(seed), "--json")
        measured = json.loads(stepfold(*words, *few))
        assert [row["name"] for row in measured["rows"]] == ["bundle", "eager"]
        assert measured["rows"][0]["evaluations"] == optimized["schedule"]["evaluations"]
        assert measured["rows"][0]["psnr_db"]["mean"] > 25
        assert measured["rows"][1]["psnr_db"]["mean"] > 100

    words = ("compare", reports / "1", reports / "2", "--max-psnr-drop", 20, "--json")
    compared = json.loads(stepfold(*words, torch=False))
    assert compared["gate"] == "passed"
    assert {row["name"] for row in compared["rows"]} == {"bundle", "eager"}
