"""`verify`: what it prints and its exit codes."""

from pathlib import Path


def test_a_sound_bundle(stepfold, read_only_bundle: Path) -> None:
    assert stepfold("verify", read_only_bundle).out == f"{read_only_bundle}: ok\n"
    assert stepfold("verify", read_only_bundle, "--json").document() == {
        "ok": True,
        "problems": [],
        "not_checked_here": [],
    }


def test_a_changed_byte(stepfold, bundle_folder: Path) -> None:
    file = bundle_folder / "stages" / "step.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    result = stepfold("verify", bundle_folder, "--json")
    document = result.document()
    assert (result.code, document["ok"]) == (1, False)
    assert document["problems"][0].startswith("stages/step.onnx: expected sha256")
    assert document["not_checked_here"] == ["stages and probe: not run from damaged files."]
    text = stepfold("verify", bundle_folder)
    assert text.code == 1
    assert "problem: stages/step.onnx" in text.out and "not usable" in text.out


def test_missing_folder(stepfold, tmp_path: Path) -> None:
    result = stepfold("verify", tmp_path / "none", "--json")
    assert (result.code, result.out) == (2, "")
    assert "expected the folder of a bundle; there is none" in result.error
