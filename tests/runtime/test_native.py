"""Native code is opened when this user built it here, or asked for it; ONNX Runtime plays the engine that has some."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from folders import hashes

import stepfold
from stepfold.backends import Backend, registry
from stepfold.backends.onnxruntime.backend import Onnxruntime
from stepfold.bundle import read
from stepfold.bundle.verify import verify
from stepfold.cli import main
from stepfold.ir.program import Program
from stepfold.loop.errors import UsageError
from stepfold.runtime.engine import Engine, load, open_stage
from stepfold.runtime.native import remember

REFUSAL = "expected a bundle that you built on this machine; its stages are native code for 'onnxruntime'"


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An engine of native code in a cache of its own; the names of the stages that it was let open."""
    opened: list[str] = []
    real = Backend.open_session

    def watched(backend: Backend, file: Path, *arguments: object, **more: object) -> object:
        opened.append(file.name)
        return real(backend, file, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Onnxruntime, "native", True)
    monkeypatch.setattr(Backend, "open_session", watched)
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "cache"))
    return opened


def test_inductor_is_the_engine_of_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [backend.name for backend in registry.BACKENDS if backend.native] == ["inductor"]


def test_foreign_native_code_is_not_opened(read_only_bundle: Path, native: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=REFUSAL):
        load(read_only_bundle)
    for words in (("generate", read_only_bundle, "--npy", tmp_path / "x.npy"), ("bench", read_only_bundle)):
        assert main([str(word) for word in words]) == 2
    assert native == [] and hashes(tmp_path) == {}


def test_verify_says_what_it_did_not_open(read_only_bundle: Path, native: list[str]) -> None:
    problems, not_checked_here = verify(read_only_bundle, open_stage)
    assert (problems, native) == ([], [])
    assert [line.split(":")[0] for line in not_checked_here] == ["stage embed", "stage step", "probe"]
    assert REFUSAL in not_checked_here[0]
    assert main(["verify", str(read_only_bundle)]) == 0 and native == []
    assert main(["verify", "--allow-native", str(read_only_bundle)]) == 0 and native == ["embed.onnx", "step.onnx"]


def test_it_is_opened_on_request(read_only_bundle: Path, tmp_path: Path) -> None:
    engine = load(read_only_bundle, allow_native=True)
    assert isinstance(engine, Engine)
    words = ["generate", str(read_only_bundle), "--npy", str(tmp_path / "x.npy")]
    assert main([*words, "--allow-native"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), engine.generate(1))


def test_what_was_built_here_is_remembered(
    tiny_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = stepfold.lower(tiny_program, out=tmp_path / "bundle")
    shutil.copytree(bundle, tmp_path / "copy")
    assert load(bundle) and load(tmp_path / "copy")
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "of_somebody_else"))
    with pytest.raises(UsageError, match=REFUSAL):
        load(bundle)


def _open_to_others(note: Path) -> None:
    note.chmod(0o666)


def _of_another_bundle(note: Path) -> None:
    note.write_text("0" * 64)


def _a_link(note: Path) -> None:
    note.rename(note.with_name("elsewhere"))
    note.symlink_to("elsewhere")


@pytest.mark.parametrize("spoil", [_open_to_others, _of_another_bundle, _a_link])
def test_a_note_that_others_could_have_made_does_not_count(read_only_bundle: Path, tmp_path: Path, spoil) -> None:
    remember(read(read_only_bundle).manifest)
    assert load(read_only_bundle)
    (note,) = (tmp_path / "cache" / "native").iterdir()
    spoil(note)
    with pytest.raises(UsageError, match=REFUSAL):
        load(read_only_bundle)


def test_a_cache_that_cannot_be_written_is_warned_of(
    read_only_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no folder")
    remember(read(read_only_bundle).manifest)
    assert "the bundle cannot be remembered and needs --allow-native: " in caplog.text
    with pytest.raises(UsageError, match=REFUSAL):
        load(read_only_bundle)
