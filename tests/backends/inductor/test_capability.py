"""What is missing for AOTInductor is told before anything is compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stepfold.backends import capability as shared
from stepfold.backends import get
from stepfold.backends.inductor import capability
from stepfold.loop.errors import UsageError
from stepfold.loop.ports import Port
from stepfold.runtime.workshop import workshop

PORT = Port("x", (None,), "float32")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of the PATH, with a compiler in it."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    file = tmp_path / "g++"
    file.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return file


def test_everything_here(compiler: Path) -> None:
    found = capability.capability()
    assert (found.name, found.can_build, found.can_run, found.reason) == ("inductor", True, True, "")


def test_a_missing_compiler_is_told_with_its_remedy(compiler: Path) -> None:
    compiler.unlink()
    found = capability.capability()
    assert (found.can_build, found.can_run) == (False, True)
    assert found.reason == "building needs a C++ compiler; g++ is not on the PATH"
    assert found.install.startswith("apt-get install g++")
    with pytest.raises(UsageError) as caught, workshop("inductor"):
        pass
    assert str(caught.value) == (f"backend 'inductor' cannot build here: {found.reason}. Install it: {found.install}")
    assert caught.value.exit_code == 2


def test_the_compiler_that_cxx_names(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang++-99")
    assert capability.capability().reason == "building needs a C++ compiler; clang++-99 is not on the PATH"
    compiler.rename(compiler.with_name("clang++-99"))
    assert capability.capability().can_build


def test_a_system_without_shared_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    found = capability.capability()
    assert (found.can_build, found.can_run) == (False, False)
    assert found.reason == "stages are shared objects for linux or darwin; this system is win32"


def test_without_torch_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared.importlib.util, "find_spec", lambda name: None)
    found = capability.capability()
    assert (found.can_build, found.can_run, found.version) == (False, False, None)
    with pytest.raises(UsageError, match=r"'inductor' cannot run here: torch is not installed\. Install it: pip inst"):
        get("inductor").open_session(tmp_path / "x.so", (PORT,), (PORT,))


def test_asking_imports_no_torch() -> None:
    code = "import sys; from stepfold.backends import get; get('inductor').capability(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
