"""`refit`: the schedule of a bundle fitted again, in one step or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save_tiny_dit
from safetensors.numpy import load_file

from stepfold.bundle import Tables, read, write_manifest, write_tables
from stepfold.bundle.manifest import PipelineEntry, TokenizerEntry
from stepfold.bundle.reader import read_manifest
from stepfold.ir.program import Program
from stepfold.runtime import refit
from stepfold.runtime.engine import load


@pytest.fixture
def bundle(compiled_bundle: Path, tmp_path: Path) -> Path:
    """A copy to fit again."""
    return Path(shutil.copytree(compiled_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def original(compiled_bundle: Path, tiny_checkpoint: Path) -> Program:
    """What the bundle and its copies were made from."""
    return refit._original(load(compiled_bundle), tiny_checkpoint)


@pytest.fixture
def captured_once(original: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not load and capture it again for every command."""
    monkeypatch.setattr(refit, "_original", lambda engine, checkpoint: original)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spoil(bundle: Path) -> None:
    """Weigh the newest outputs wrongly, as a fit for another engine would, and leave the hashes right."""
    found = read(bundle)
    tables = found.tables()
    fitted = {}
    for scale, table in tables.fitted.items():
        object.__setattr__(table, "state", table.state * 0.9)
        fitted[scale] = table
    write_tables(bundle, Tables(tables.recurrence, fitted, tables.values, tables.constants))
    write_manifest(bundle, found.manifest)


def positions(bundle: Path) -> list[int]:
    return load_file(bundle / "tables.safetensors")["scale=2.0/positions"].tolist()


def branches(schedule: dict[str, int]) -> int:
    """What a schedule costs: a guided evaluation is two."""
    return schedule["evaluations"] + schedule["guided_evaluations"]


def test_a_spoiled_schedule_is_mended(stepfold, bundle: Path, tiny_checkpoint: Path) -> None:
    original, before = load_file(bundle / "tables.safetensors"), contents(bundle)
    spoil(bundle)
    result = stepfold("refit", bundle, "--reference", tiny_checkpoint, "--json")
    assert result.code == 0, result.err
    document = result.document()
    assert document["searched"] is False
    assert document["schedule"]["fitted_on"] == "engine"
    assert document["quality"]["set"] == "held-out"
    mended = load_file(bundle / "tables.safetensors")
    assert mended.keys() == original.keys()
    for name, value in mended.items():
        np.testing.assert_allclose(value, original[name], rtol=1e-6, atol=1e-9)
    assert stepfold("verify", bundle).code == 0
    after = contents(bundle)
    stages = [name for name in before if name.startswith(("stages/", "probe"))]
    assert len(stages) >= 3 and all(after[name] == before[name] for name in stages)
    assert after.keys() == before.keys()


@pytest.mark.usefixtures("captured_once")
def test_a_higher_budget_is_searched_for(stepfold, bundle: Path, tiny_checkpoint: Path) -> None:
    best = json.loads((bundle / "manifest.json").read_text())["quality"]["psnr_db"]["low"]
    words = ("refit", bundle, "--reference", tiny_checkpoint, "--min-psnr", f"{best + 4:.1f}", "--json")
    result = stepfold(*words)
    assert result.code == 0, result.err
    document = result.document()
    assert document["searched"] is True
    assert document["schedule"]["evaluations"] == len(positions(bundle))
    assert branches(document["schedule"]) > branches(document["before"]["schedule"])
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["recipe"]["passes"][-1]["schedule"]["min_psnr"] == pytest.approx(best + 4, abs=0.1)
    assert manifest["schedule"] == document["schedule"] and manifest["quality"] == document["quality"]


@pytest.mark.usefixtures("captured_once")
def test_text(stepfold, bundle: Path, tiny_checkpoint: Path) -> None:
    result = stepfold("refit", bundle, "--reference", tiny_checkpoint)
    assert (result.code, result.err) == (0, "")
    assert "Before: Schedule" in result.out and "Now: Quality" in result.out
    assert "The evaluated calls were kept." in result.out


@pytest.mark.usefixtures("captured_once")
def test_reports_of_the_old_schedule_go(stepfold, bundle: Path, tiny_checkpoint: Path) -> None:
    before, manifest = contents(bundle), read(bundle).manifest
    for name in ("report.json", "report.html"):
        (bundle / name).write_text("{}")
    write_manifest(bundle, manifest)
    assert stepfold("refit", bundle, "--reference", tiny_checkpoint).code == 0
    assert contents(bundle).keys() == read(bundle).manifest.files.keys() | {"manifest.json"} == before.keys()


@pytest.mark.usefixtures("captured_once")
def test_what_surrounds_the_loop_stays(stepfold, bundle: Path, bundle_folder: Path, tiny_checkpoint: Path) -> None:
    """A text encoder and a tokenizer beside the loop, as a pipeline has them, which nothing has to open."""
    shutil.copytree(bundle_folder, bundle / "text")
    (bundle / "tokenizers").mkdir()
    (bundle / "tokenizers" / "input_ids.json").write_text("{}")
    tokenizer = TokenizerEntry(input="input_ids", file="tokenizers/input_ids.json")
    pipeline = PipelineEntry(class_name="TinyPipeline", tokenizers=(tokenizer,), text="text")
    write_manifest(bundle, read_manifest(bundle).model_copy(update={"pipeline": pipeline}))
    around = {name: value for name, value in contents(bundle).items() if name.startswith(("text/", "tokenizers/"))}
    assert stepfold("refit", bundle, "--reference", tiny_checkpoint).code == 0
    after = contents(bundle)
    assert len(around) > 5 and {name: after.get(name) for name in around} == around
    found = read(bundle)
    assert found.manifest.pipeline == pipeline
    assert found.within("text").manifest == read(bundle_folder).manifest
    assert stepfold("verify", bundle).code == 0


@pytest.mark.usefixtures("captured_once")
def test_a_budget_that_cannot_be_met_leaves_the_bundle(stepfold, bundle: Path, tiny_checkpoint: Path) -> None:
    before = contents(bundle)
    result = stepfold("refit", bundle, "--reference", tiny_checkpoint, "--min-psnr", "110", "--json")
    assert (result.code, result.out) == (3, "")
    assert "no schedule reaches 110 dB; the best was" in result.error
    assert contents(bundle) == before
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle"]


@pytest.mark.usefixtures("captured_once")
def test_writing_that_stops_leaves_the_bundle(stepfold, bundle: Path, tiny_checkpoint: Path, monkeypatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = contents(bundle)
    monkeypatch.setattr("stepfold.runtime.refit.write_schedule", interrupted)
    result = stepfold("refit", bundle, "--reference", tiny_checkpoint)
    assert (result.code, result.error) == (1, "interrupted; nothing was written.")
    assert contents(bundle) == before
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle"]


def test_another_model_is_refused(stepfold, compiled_bundle: Path, tmp_path: Path) -> None:
    other = save_tiny_dit(tmp_path / "other", seed=1)
    result = stepfold("refit", compiled_bundle, "--reference", other)
    assert result.code == 2
    assert "expected the checkpoint the bundle was made from, with weights" in result.error


def test_a_bundle_without_a_schedule_is_refused(stepfold, read_only_bundle: Path, tiny_checkpoint: Path) -> None:
    result = stepfold("refit", read_only_bundle, "--reference", tiny_checkpoint)
    assert (result.code, "expected a bundle with a fitted schedule" in result.error) == (2, True)


def test_missing_folders(stepfold, compiled_bundle: Path, tmp_path: Path) -> None:
    result = stepfold("refit", tmp_path / "none", "--reference", tmp_path)
    assert (result.code, "there is none" in result.error) == (2, True)
    result = stepfold("refit", compiled_bundle, "--reference", tmp_path / "none")
    assert (result.code, "no such checkpoint folder" in result.error) == (2, True)
