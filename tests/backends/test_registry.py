"""Backends say what they can do here without being imported, and unknown ones get a hint."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stepfold.backends import backends, capability, get
from stepfold.backends.onnxruntime import capability as onnxruntime_capability
from stepfold.loop.errors import UsageError
from stepfold.loop.ports import Port


def test_onnxruntime_is_listed() -> None:
    found = {item.name: item for item in backends()}["onnxruntime"]
    assert found.can_run and found.version is not None and found.install.startswith("pip install ")


def test_asking_imports_no_engine() -> None:
    code = (
        "import sys; from stepfold.backends import backends; backends(); "
        "print([m for m in ('onnxruntime', 'torch', 'onnx') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("name", "hint"), [("onnxruntim", "did you mean 'onnxruntime'?"), ("zzz", "valid: ")])
def test_an_unknown_backend(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        get(name)
    assert repr(name) in str(error.value) and hint in str(error.value) and error.value.exit_code == 2


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    find = capability.importlib.util.find_spec
    monkeypatch.setattr(capability.importlib.util, "find_spec", lambda name: None if name in modules else find(name))


def test_a_missing_compiler_leaves_running(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch", "onnx")
    found = onnxruntime_capability.capability()
    assert (found.can_build, found.can_run) == (False, True)
    assert found.reason == "building needs torch, onnx" and found.install == "pip install 'stepfold[compile]'"


def test_a_missing_engine_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    without(monkeypatch, "onnxruntime")
    found = onnxruntime_capability.capability()
    assert (found.can_build, found.can_run, found.version) == (False, False, None)
    port = Port("x", (None,), "float32")
    with pytest.raises(
        UsageError, match=r"cannot run here: onnxruntime is not installed\. Install it: pip install onnx"
    ):
        get("onnxruntime").open_session(tmp_path / "x.onnx", (port,), (port,))


def test_everything_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability.importlib.util, "find_spec", lambda name: object())
    found = onnxruntime_capability.capability()
    assert (found.can_build, found.can_run, found.reason) == (True, True, "")


def test_a_module_that_may_not_be_imported_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(capability.importlib.util, "find_spec", blocked)
    assert not capability.installed("torch")


def test_version_of_the_first_that_is_installed() -> None:
    assert capability.version_of(["no-such-distribution", "numpy"]) == __import__("numpy").__version__
    assert capability.version_of(["no-such-distribution"]) is None
