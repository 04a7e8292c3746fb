"""From a checkpoint to a bundle: what is recorded, and that nothing is left when something goes wrong."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import QUICK
from folders import hashes

import stepfold
from stepfold.bundle.verify import verify
from stepfold.ir.program import Program
from stepfold.loop.budget import QualityBudget
from stepfold.loop.errors import GateError, StepfoldError, UsageError
from stepfold.loop.metrics import drift, lower_bound, psnr
from stepfold.loop.noise import noise
from stepfold.passes.base import silent
from stepfold.runtime import packing
from stepfold.runtime.compiler import Job, cache_folder, optimize
from stepfold.runtime.ends import Ends
from stepfold.runtime.engine import open_stage
from stepfold.runtime.unoptimized import Unoptimized

pytestmark = pytest.mark.usefixtures("each_stage_once")
SCHEDULE = {"schedule": {**QUICK, "evaluations": 3}}
FITTED = {"passes": ["hoist", {"quantize": {}}, {"fuse": {}}, SCHEDULE]}
LONE = "layers"  # the stage of nothing but the layers of a group


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders of this test are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def build(checkpoint: Path, out: Path, recipe: Any = None, **more: Any) -> dict[str, Any]:
    return optimize(Job(checkpoint, out, recipe=recipe or FITTED, **more), silent)


@pytest.fixture(scope="module")
def optimized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("optimized") / "bundle"
    return out, build(tiny_checkpoint, out)


def test_the_summary_is_what_was_built(optimized: tuple[Path, dict[str, Any]], tiny_program: Program) -> None:
    out, document = optimized
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert [entry["name"] for entry in document["passes"]] == ["hoist", "quantize", "fuse", "schedule"]
    assert [entry["outcome"] for entry in document["passes"]] == ["changed"] * 4
    assert [(stage["name"], stage["rate"]) for stage in document["stages"]] == [
        ("once", "once"), ("once_timestep", "once×timestep"), ("step", "step"),
    ]  # fmt: skip
    for stage in document["stages"]:
        assert stage["bytes"] == sum(path.stat().st_size for path in (out / "stages").glob(f"{stage['name']}.*"))
    assert document["schedule"] == {"grid_steps": 8, "evaluations": 3, "guided_evaluations": 3, "fitted_on": "engine"}
    assert document["passes"][0]["parameters_before"] == tiny_program.parameters()
    psnr = {entry["name"]: entry["psnr_db"] for entry in document["passes"]}
    assert psnr["hoist"] is psnr["fuse"] is None  # exact
    assert 100 > psnr["quantize"] > psnr["schedule"] + 3
    assert psnr["schedule"] == pytest.approx(document["quality"]["psnr_db"]["mean"], abs=6)  # fewer samples
    assert document["seconds"] > document["fit_seconds"] > 0
    assert document["bundle"] == str(out)


def test_the_manifest_records_the_run(optimized: tuple[Path, dict[str, Any]], tiny_program: Program) -> None:
    manifest = stepfold.load(optimized[0]).manifest
    assert manifest.seeds == {"seed": 0, "calibration": (0, 1), "validation": (0, 2), "held-out": (0, 3)}
    assert manifest.model.weights_sha256 == tiny_program.model.weights_sha256
    assert manifest.batch_invariant is False
    assert [next(iter(entry)) for entry in manifest.recipe["passes"]] == ["hoist", "quantize", "fuse", "schedule"]  # type: ignore[index]
    assert manifest.passes[-1].details["2.0"]["chosen"]["evaluations"] == 3  # type: ignore[index]


def test_the_reported_quality_is_that_of_held_out_samples(
    optimized: tuple[Path, dict[str, Any]], tiny_program: Program
) -> None:
    """Worked out again from the bundle: 64 samples of the third set, classes in turn; in another batch, which is felt."""
    engine, quality = stepfold.load(optimized[0]), optimized[1]["quality"]
    latents, labels = noise([0, 3], (64, 1, 8, 8)), np.arange(64) % 4
    reference = unoptimized(tiny_program).sample(latents, conditions={"class_labels": labels})
    values = psnr(engine.sample(noise=latents, class_labels=labels), reference)
    assert quality["set"] == "held-out" and quality["samples"] == 64
    assert quality["psnr_db"]["mean"] == pytest.approx(values.mean(), abs=0.3)
    assert quality["psnr_db"]["min"] == pytest.approx(values.min(), abs=0.5)
    assert quality["psnr_db"]["low"] == pytest.approx(lower_bound(values), abs=0.3)
    assert engine.manifest.quality is not None and engine.manifest.quality.psnr_db.mean == quality["psnr_db"]["mean"]


def unoptimized(program: Program) -> Unoptimized:
    assert program.loop is not None and program.recurrence is not None
    return Unoptimized(program.loop, program.recurrence, program.bind(), Ends())


def test_the_bundle_verifies(optimized: tuple[Path, dict[str, Any]]) -> None:
    assert verify(optimized[0], open_stage) == ([], [])


def test_a_scale_without_a_fitted_table_runs_every_call(
    optimized: tuple[Path, dict[str, Any]], tiny_program: Program
) -> None:
    """So only the 8 bits differ."""
    engine = stepfold.load(optimized[0])
    latents, labels = noise(3, (4, 1, 8, 8)), np.arange(4)
    received = engine.sample(latents, guidance=1.5, class_labels=labels)
    reference = unoptimized(tiny_program).sample(latents, guidance=1.5, conditions={"class_labels": labels})
    assert 1e-6 < drift(received, reference) < 0.05


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(
    optimized: tuple[Path, dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages, tables, schedule and probe; the manifest has the seconds it took. Each stage is compiled once: the step
    stage as quantize left it, whose samples are measured, and as fuse left it. Beside them are the lone layers whose
    integers and floats quantize times."""
    from stepfold.backends.onnxruntime import lower as module

    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "cache"))  # else nothing would be compiled
    names: list[str] = []
    real = module.lower
    monkeypatch.setattr(module, "lower", lambda stage, folder, **_: names.append(stage.name) or real(stage, folder))
    build(tiny_checkpoint, tmp_path / "again")
    before, after = hashes(optimized[0]), hashes(tmp_path / "again")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json"}
    assert [name for name in names if name != LONE] == ["once", "once_timestep", "step", "step"]


@pytest.mark.usefixtures("captured_once")
def test_options_progress_and_cache(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "cache"))
    told: list[tuple[str, int, int]] = []
    settings = [("schedule", "evaluations", 2), ("quantize", "skip", ["*.ff.*"])]
    job = Job(tiny_checkpoint, tmp_path / "bundle", recipe=FITTED, settings=settings, seed=1)
    document = optimize(job, lambda *report: told.append(report))
    assert document["schedule"]["evaluations"] == 2 and document["passes"][1]["changed"] == 4
    manifest = stepfold.load(tmp_path / "bundle").manifest
    assert manifest.recipe["passes"][1]["quantize"]["skip"] == ["*.ff.*"]  # type: ignore[index]
    assert manifest.seeds["seed"] == 1 and manifest.seeds["held-out"] == (1, 3)
    tasks = list(dict.fromkeys(task for task, _, _ in told))
    assert tasks[:2] == ["loading", "capturing"] and tasks[-1] == "compiling"
    for name in ("calibration", "validation", "held-out"):
        assert f"reference trajectories ({name})" in tasks
    assert all(0 <= done <= max(total, 1) for _, done, total in told)
    assert len(list((tmp_path / "cache" / "trajectories").iterdir())) == 3
    assert {stage["reused"] for stage in document["stages"]} == {False}
    assert len(list((tmp_path / "cache" / "stages").iterdir())) >= len(document["stages"])


# -- what goes wrong leaves nothing


@pytest.mark.usefixtures("captured_once")
def test_a_budget_that_cannot_be_met_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, temporary: Path) -> None:
    recipe = {"passes": [{"quantize": {}}, {"schedule": QUICK}]}
    with pytest.raises(GateError, match=r"no schedule reaches 120 dB; the best was [\d.]+ dB") as caught:
        build(tiny_checkpoint, tmp_path / "bundle", recipe, min_psnr=QualityBudget(mean=120))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "bundle").exists() and list(temporary.iterdir()) == []


@pytest.mark.usefixtures("captured_once")
def test_a_budget_without_a_schedule_is_checked_too(tiny_checkpoint: Path, tmp_path: Path, temporary: Path) -> None:
    recipe = {"passes": ["quantize"]}
    with pytest.raises(GateError, match=r"quality: expected 120 dB; the best that was reached is [\d.]+ dB"):
        build(tiny_checkpoint, tmp_path / "bundle", recipe, min_psnr=QualityBudget(mean=120))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temporary"] and list(temporary.iterdir()) == []


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


TROUBLE = [
    (full_disk, StepfoldError, ["copy2", "write_tables", "write_manifest"]),
    (interrupt, KeyboardInterrupt, ["copy2", "write_schedule", "write_probe"]),
]


@pytest.mark.parametrize(("what", "error", "place"), [(w, e, place) for w, e, places in TROUBLE for place in places])
def test_trouble_while_packing_leaves_nothing(
    fitted: Program,
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    what: Any,
    error: Any,
) -> None:
    monkeypatch.setattr(shutil if place == "copy2" else packing, place, what)
    with pytest.raises(error) as caught:
        stepfold.lower(fitted, out=tmp_path / "deep" / "bundle")
    if error is StepfoldError:
        assert "the disk is full" in str(caught.value) and caught.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temporary"]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("what", [full_disk, interrupt])
def test_trouble_while_replacing_leaves_the_old_bundle(
    captured: Program, fitted: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any
) -> None:
    out = stepfold.lower(captured, out=tmp_path / "bundle")
    before = hashes(out)
    monkeypatch.setattr(packing, "write_probe", what)
    with pytest.raises((StepfoldError, KeyboardInterrupt)):
        stepfold.lower(fitted, out=out, overwrite=True)
    assert hashes(out) == before and [path.name for path in tmp_path.iterdir()] == ["bundle"]
    stepfold.load(out)


@pytest.mark.usefixtures("captured_once")
def test_trouble_in_the_report_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, temporary: Path) -> None:
    """The bundle is finished before it takes its place."""
    seen: list[Path] = []

    def finish(folder: Path, *_: Any) -> None:
        seen.append(folder)
        assert (folder / "manifest.json").is_file() and not (tmp_path / "bundle").exists()
        raise KeyboardInterrupt

    job = Job(tiny_checkpoint, tmp_path / "bundle", recipe={"passes": ["hoist"]})
    with pytest.raises(KeyboardInterrupt):
        optimize(job, silent, finish)
    assert seen and sorted(path.name for path in tmp_path.iterdir()) == ["temporary"]
    assert list(temporary.iterdir()) == []


def test_nothing_is_started_when_out_exists(tiny_checkpoint: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(UsageError, match="already exists"):
        optimize(Job(tiny_checkpoint, tmp_path), lambda task, done, total: told.append(task))
    assert told == []


# -- parts


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("STEPFOLD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "stepfold"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "stepfold"


def test_plain_values() -> None:
    value = {
        1: np.float32(0.5),
        "nan": float("nan"),
        "list": (np.int64(3), [np.inf]),
        "text": "a",
        "none": None,
        "yes": True,
    }
    assert packing.plain(value) == {"1": 0.5, "nan": None, "list": [3, [None]], "text": "a", "none": None, "yes": True}
    assert type(packing.plain(np.int64(3))) is int and type(packing.plain(np.float32(1))) is float
