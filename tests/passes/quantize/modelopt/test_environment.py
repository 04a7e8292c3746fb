"""Where modelopt's environment is, and how it is made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.passes.quantize.modelopt import environment
from stepfold.passes.quantize.modelopt.environment import FOLDER, VARIABLE, create, find, main, python_of


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_missing_names_the_one_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find(tmp_path)
    command = f"python -m stepfold.passes.quantize.modelopt.environment {tmp_path / FOLDER}"
    assert command in str(caught.value) and VARIABLE in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_variable_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(tmp_path / FOLDER, requirements=(), check="pass")
    assert find(tmp_path) == python_of(tmp_path / FOLDER)
    monkeypatch.setenv(VARIABLE, sys.executable)
    assert find(tmp_path) == Path(sys.executable)


@pytest.mark.parametrize("given", ["nowhere/python", "."])
def test_a_variable_that_names_no_python(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / given))
    with pytest.raises(UsageError, match=rf"\${VARIABLE}: expected the Python of an environment"):
        find(tmp_path)


def test_a_failed_check_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StepfoldError, match="check: expected exit code 0; received 1"):
        create(tmp_path / "new", requirements=(), check="raise SystemExit('no such package')")
    assert list(tmp_path.iterdir()) == []
    assert "no such package" in capfd.readouterr().err


def test_a_failed_installation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip is a command like the check; a venv with pip takes long to make."""
    made = environment.venv.create

    def without_pip(folder: Path, *, with_pip: bool, symlinks: bool) -> None:
        assert with_pip
        made(folder, with_pip=False, symlinks=symlinks)

    monkeypatch.setattr(environment.venv, "create", without_pip)
    with pytest.raises(StepfoldError, match="install: expected exit code 0; received 1"):
        create(tmp_path / "new", requirements=("nothing",))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="expected no such folder yet; remove it"):
        create(tmp_path / "taken")


def test_it_does_not_see_this_environment(tmp_path: Path) -> None:
    check = "import importlib.util as u; raise SystemExit(u.find_spec('stepfold') is not None or u.find_spec('numpy') is not None)"
    assert create(tmp_path / "new", requirements=(), check=check).exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: list = []

    def recorded(folder: Path, options: list[str]) -> Path:
        given.extend([folder, options])
        return python_of(folder)

    monkeypatch.setattr(environment, "create", recorded)
    assert main([str(tmp_path / "new"), "--index-url", "https://example.org"]) == 0
    assert given == [tmp_path / "new", ["--index-url", "https://example.org"]]
    assert capsys.readouterr().out == f"{python_of(tmp_path / 'new')}\n"


def test_the_command_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: expected no such folder")


def test_the_requirements_hold_no_package_for_gpus() -> None:
    names = [requirement.split("=")[0].split("~")[0].split(">")[0] for requirement in environment.REQUIREMENTS]
    assert "nvidia-modelopt" in names and "onnxruntime" in names
    assert not {"onnxruntime-gpu", "cupy-cuda12x"} & set(names)
