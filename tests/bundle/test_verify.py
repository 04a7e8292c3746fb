"""verify reports every problem of a bundle and what could not be checked here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stepfold.bundle import Bundle, Manifest, verify, write_manifest
from stepfold.bundle.manifest import StageEntry
from stepfold.loop.errors import BundleError, UsageError
from stepfold.loop.ports import StageCallable
from stepfold.runtime.engine import open_stage


def load_session(bundle: Bundle, stage: StageEntry) -> StageCallable:
    return open_stage(bundle, stage, threads=1)


def missing_engine(bundle: Bundle, stage: StageEntry) -> StageCallable:
    if stage.name == "step":
        raise UsageError("backend 'tensorrt' cannot run here")
    return load_session(bundle, stage)


def broken_engine(bundle: Bundle, stage: StageEntry) -> StageCallable:
    raise BundleError(f"{stage.file}: cannot be loaded")


def hash_again(folder: Path) -> None:
    write_manifest(folder, Manifest.model_validate_json((folder / "manifest.json").read_text()))


@pytest.mark.parametrize("timestep_table", [False, True])
def test_a_sound_bundle(tiny, tmp_path: Path, timestep_table: bool) -> None:
    assert verify(tiny.build(tmp_path / "b", timestep_table=timestep_table), load_session) == ([], [])


def test_every_damaged_file_is_named(bundle_folder: Path) -> None:
    (bundle_folder / "schedule.json").unlink()
    (bundle_folder / "stages" / "step.onnx").write_bytes(b"x")
    (bundle_folder / "stages" / "stray.onnx").write_bytes(b"x")
    problems, not_checked_here = verify(bundle_folder, load_session)
    assert [line.split(":")[0] for line in problems] == ["schedule.json", "stages/step.onnx", "stages/stray.onnx"]
    assert not_checked_here == ["stages and probe: not run from damaged files."]


def test_an_unknown_file_is_a_problem_of_its_own(bundle_folder: Path) -> None:
    (bundle_folder / "notes.txt").write_text("")
    problems, not_checked_here = verify(bundle_folder, load_session)
    assert problems == [
        "notes.txt: not part of the bundle: the manifest does not name it. Remove it, or build the bundle again."
    ]
    assert not_checked_here == []


@pytest.mark.parametrize("text", ["", "{}", '{"format_version": 99}'])
def test_a_damaged_manifest_is_reported(bundle_folder: Path, text: str) -> None:
    (bundle_folder / "manifest.json").write_text(text)
    problems, not_checked_here = verify(bundle_folder, load_session)
    assert len(problems) == 1 and not_checked_here == ["files, stages and probe: the manifest cannot be used."]


def test_a_path_that_leaves_the_folder_is_reported(bundle_folder: Path) -> None:
    data = json.loads((bundle_folder / "manifest.json").read_text())
    data["files"]["../x"] = data["files"]["schedule.json"]
    (bundle_folder / "manifest.json").write_text(json.dumps(data))
    problems, _ = verify(bundle_folder, load_session)
    assert len(problems) == 1 and "the path '../x'" in problems[0]


def test_a_missing_folder_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected the folder of a bundle"):
        verify(tmp_path / "nowhere", load_session)


def test_a_missing_engine_is_no_problem(bundle_folder: Path) -> None:
    problems, not_checked_here = verify(bundle_folder, missing_engine)
    assert problems == []
    assert not_checked_here == [
        "stage step: backend 'tensorrt' cannot run here",
        "probe: not replayed, because not every stage runs here.",
    ]


def test_a_stage_that_cannot_be_loaded_is_a_problem(bundle_folder: Path) -> None:
    problems, _ = verify(bundle_folder, broken_engine)
    assert problems == [
        "stage embed: stages/embed.onnx: cannot be loaded",
        "stage step: stages/step.onnx: cannot be loaded",
    ]


def test_a_stage_that_computes_something_else(bundle_folder: Path) -> None:
    path = bundle_folder / "stages" / "step.onnx.data"
    path.write_bytes((np.frombuffer(path.read_bytes(), np.float32) * 1.01).astype(np.float32).tobytes())
    hash_again(bundle_folder)
    problems, not_checked_here = verify(bundle_folder, load_session)
    assert len(problems) == 1 and problems[0].startswith("probe: expected sample within 0.0001 of the recorded values")
    assert not_checked_here == []


@pytest.mark.parametrize("call", [None, 7])
def test_a_probe_that_does_not_fit_is_a_problem(tiny, tmp_path: Path, call: int | None) -> None:
    folder = tiny.build(tmp_path / "b", timestep_table=True)
    arrays = load_file(folder / "probe.safetensors")
    arrays.pop("call")
    if call is not None:
        arrays["call"] = np.array([call])
    save_file(arrays, folder / "probe.safetensors")
    hash_again(folder)
    problems, _ = verify(folder, load_session)
    assert len(problems) == 1 and "probe: expected inputs and a grid call" in problems[0]


def test_a_probe_of_another_model_is_a_problem(bundle_folder: Path) -> None:
    arrays = load_file(bundle_folder / "probe.safetensors")
    arrays["inputs/hidden_states"] = np.zeros((2, 3, 2, 2), np.float32)
    save_file(arrays, bundle_folder / "probe.safetensors")
    hash_again(bundle_folder)
    problems, _ = verify(bundle_folder, load_session)
    assert len(problems) == 1 and "probe: expected inputs ['hidden_states']" in problems[0]


def test_a_bundle_without_a_probe(bundle_folder: Path) -> None:
    data = json.loads((bundle_folder / "manifest.json").read_text())
    data["probe"] = None
    del data["files"]["probe.safetensors"]
    (bundle_folder / "probe.safetensors").unlink()
    (bundle_folder / "manifest.json").write_text(json.dumps(data))
    assert verify(bundle_folder, load_session) == ([], ["probe: none recorded."])


def test_stages_that_do_not_fit_together(bundle_folder: Path) -> None:
    data = json.loads((bundle_folder / "manifest.json").read_text())
    data["stages"][0]["outputs"][0]["name"] = "shifts"
    (bundle_folder / "manifest.json").write_text(json.dumps(data))
    problems, _ = verify(bundle_folder, load_session)
    assert len(problems) == 1
    assert "stage step: expected a value shift [B, 1] float32; received none." in problems[0]
