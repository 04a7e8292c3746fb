"""`inspect` of a checkpoint and of a bundle."""

import json
from pathlib import Path

import pytest

from stepfold.backends import instructions


def test_a_bundle_prints_its_manifest(stepfold, read_only_bundle: Path) -> None:
    document = stepfold("inspect", read_only_bundle, "--json").document()
    assert document == json.loads((read_only_bundle / "manifest.json").read_text())


def test_a_bundle_as_text(stepfold, read_only_bundle: Path) -> None:
    result = stepfold("inspect", read_only_bundle)
    assert result.code == 0
    for text in ("Tiny, recipe tiny", "[B, 1, 2, 2]", "guidance 2, 3.", "stages/step.onnx", "does not depend"):
        assert text in result.out
    bytes_of_step = sum(path.stat().st_size for path in (read_only_bundle / "stages").glob("step.*"))
    assert f" {bytes_of_step:,} " in result.out  # with the weights beside the file


def test_a_checkpoint(stepfold, tiny_checkpoint: Path) -> None:
    document = stepfold("inspect", tiny_checkpoint, "--json").document()
    keys = {"class", "parameters", "inputs", "loop", "rates", "sites", "frozen_dimensions", "unsupported"}
    assert keys <= document.keys()
    assert document["class"] == "DiTTransformer2DModel"
    assert [entry["role"] for entry in document["inputs"]] == ["state", "timestep", "condition"]
    assert sum(entry["parameters"] for entry in document["rates"]) == document["parameters"]
    assert document["sites"]["attention"] == 1


def test_a_bundle_of_another_processor(stepfold, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JSON stays the manifest; people, and `verify`, are told what differs."""
    document = json.loads((bundle_folder / "manifest.json").read_text())
    document["backend"]["instructions"] = ["avx2"]
    (bundle_folder / "manifest.json").write_text(json.dumps(document))
    monkeypatch.setattr(instructions, "processor", lambda: {"instructions": "avx2 avx512_vnni"})
    line = "speed: measured on a processor with avx2; this processor has avx512_vnni"
    assert f"differs here: {line}" in stepfold("inspect", bundle_folder).out
    assert stepfold("inspect", bundle_folder, "--json").document() == document
    assert stepfold("verify", bundle_folder, "--json").document()["not_checked_here"][0].startswith(line)


def test_a_checkpoint_as_text(stepfold, tiny_checkpoint: Path) -> None:
    result = stepfold("inspect", tiny_checkpoint)
    assert (result.code, result.err) == (0, "")
    for text in ("DiTTransformer2DModel: 10,388 parameters", "once×timestep", "feed-forward", "8 steps"):
        assert text in result.out


def test_missing_folder(stepfold, tmp_path: Path) -> None:
    result = stepfold("inspect", tmp_path / "none")
    assert (result.code, "there is none" in result.error) == (2, True)


def test_a_folder_of_something_else(stepfold, tmp_path: Path) -> None:
    result = stepfold("inspect", tmp_path)
    assert (result.code, "config.json: expected" in result.error) == (2, True)
