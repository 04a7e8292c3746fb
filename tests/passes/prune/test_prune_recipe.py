"""The recipe `prune` from a checkpoint to a bundle: each pass says what it cost, and the bundle is a smaller network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import QUICK

from stepfold.loop.budget import QualityBudget
from stepfold.runtime.compiler import Job, optimize


@pytest.mark.usefixtures("captured_once")
def test_prune_quantize_and_schedule(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = [("schedule", name, value) for name, value in QUICK.items()]
    job = Job(tiny_checkpoint, tmp_path / "out", recipe="prune", settings=settings, min_psnr=QualityBudget(mean=20))
    optimize(job, lambda task, done, total: None)
    passes = {item["name"]: item for item in json.loads((tmp_path / "out" / "manifest.json").read_text())["passes"]}
    assert list(passes) == ["hoist", "prune", "quantize", "fuse", "schedule"]
    assert passes["prune"]["outcome"] == passes["quantize"]["outcome"] == "changed"
    assert passes["prune"]["flops_after"] < passes["prune"]["flops_before"]
    assert passes["prune"]["psnr_db"] > 20 and passes["quantize"]["flops_after"] == passes["prune"]["flops_after"]
