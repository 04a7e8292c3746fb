"""Backends say what they can do here without being imported, and unknown ones get a hint."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from stepfold.backends import Backend, backends, capability, get
from stepfold.backends.onnxruntime import capability as onnxruntime_capability
from stepfold.backends.registry import BACKENDS
from stepfold.loop.errors import UsageError
from stepfold.loop.options import Options
from stepfold.loop.ports import Port
from stepfold.passes.registry import PASSES


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
    assert capability.version_of(("no-such-distribution", "numpy")) == __import__("numpy").__version__
    assert capability.version_of(("no-such-distribution",)) is None


# -- options


class FakeOptions(Options):
    """Options.

    Attributes:
        level: of the fake.
    """

    level: int = 1
    mode: Literal["fast", "exact"] = "fast"


@dataclass(frozen=True)
class FakeBackend(Backend):
    """A backend whose sessions tell what they were given."""

    name: ClassVar[str] = "fake"
    suffix: ClassVar[str] = ".fake"

    options: FakeOptions = field(default_factory=FakeOptions)

    def capability(self) -> capability.Capability:
        return capability.Capability(self.name, True, True, "1", "", "")

    def lower(self, stage: Any, folder: Path) -> Path:
        raise NotImplementedError

    def session(self, file: Path, inputs: Any, outputs: Any, **keywords: Any) -> Any:
        return {**keywords, "level": self.options.level}


@pytest.mark.parametrize(
    ("asked", "given"), [({}, {"threads": None, "device": "cpu"}), ({"threads": 3, "device": "gpu"}, {})]
)
def test_a_session_gets_options_and_defaults(tmp_path: Path, asked: dict[str, Any], given: dict[str, Any]) -> None:
    backend = FakeBackend().with_options({"level": 2})
    seen: Any = backend.open_session(tmp_path / "step.fake", (), (), **asked)
    files = seen.pop("files")
    assert seen == {**asked, **given, "level": 2} and files.folder == tmp_path


def test_what_an_engine_need_not_say(tmp_path: Path) -> None:
    """The defaults of what only some engines have."""
    backend, stage = FakeBackend(), object()
    assert backend.prepared(stage) is stage and not backend.float_without_vnni(stage)  # type: ignore[arg-type]
    assert backend.share([tmp_path]) is None and backend.target() is None and backend.exact_form is None
    assert backend.capability_here() == backend.capability()
    assert backend.code_folder() == Path(__file__).parent


def test_an_engine_without_its_methods_is_no_backend() -> None:
    class Unfinished(Backend):
        name, suffix = "unfinished", ".none"

    with pytest.raises(TypeError, match="abstract methods capability, lower, session"):
        Unfinished()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levl": 1}, "backend fake: unknown option 'levl'; did you mean 'level'?"),
        ({"level": "high"}, "backend fake: option 'level': expected a valid integer"),
        ({"mode": "slow"}, "backend fake: option 'mode': expected 'fast' or 'exact'; received 'slow'."),
    ],
)
def test_options_that_an_engine_does_not_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        FakeBackend().with_options(options)
    assert message in str(error.value)


def test_no_pass_has_the_name_of_a_backend() -> None:
    """`--set NAME.OPTION` addresses one of them."""
    assert {item.name for item in PASSES}.isdisjoint(backend.name for backend in BACKENDS)
