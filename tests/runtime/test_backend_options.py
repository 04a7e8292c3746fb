"""Options of a backend: from the command line or Python to its lowering, the manifest and its sessions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from programs import component

import stepfold
from stepfold.backends import Backend, registry
from stepfold.backends.capability import Capability
from stepfold.backends.onnxruntime.backend import Onnxruntime
from stepfold.ir.program import Program, Stage
from stepfold.loop.errors import UsageError
from stepfold.loop.options import Options
from stepfold.passes.base import silent
from stepfold.runtime.compiler import Job, optimize


class TunableOptions(Options):
    """Options.

    Attributes:
        level: of nothing.
    """

    level: int = 1


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Options]]:
    """Registers the backend `tunable`, which is ONNX Runtime with an option; what its functions were given."""
    given: list[tuple[str, Options]] = []

    @dataclass(frozen=True)
    class Tunable(Backend):
        name: ClassVar[str] = "tunable"
        suffix: ClassVar[str] = ".onnx"

        options: TunableOptions = field(default_factory=TunableOptions)

        def capability(self) -> Capability:
            return registry.get("onnxruntime").capability()

        def lower(self, stage: Stage, folder: Path) -> Path:
            given.append(("lower", self.options))
            return registry.get("onnxruntime").lower(stage, folder)

        def session(self, *arguments: Any, **keywords: Any) -> Any:
            given.append(("session", self.options))
            return registry.get("onnxruntime").session(*arguments, **keywords)

    monkeypatch.setattr(registry, "BACKENDS", (*registry.BACKENDS, Tunable()))
    return given


@pytest.fixture
def program() -> Program:
    import torch

    return component(torch.nn.Linear(4, 3), torch.randn(2, 4))


def test_options_are_recorded_and_given_again(seen: list, program: Program, tmp_path: Path) -> None:
    out = stepfold.lower(program, "tunable", out=tmp_path / "bundle", options={"level": 3})
    assert seen == [("lower", TunableOptions(level=3)), ("session", TunableOptions(level=3))]
    assert stepfold.load(out).manifest.backend.options == {"level": 3}
    assert seen[2:] == [("session", TunableOptions(level=3))]


def test_defaults_are_recorded_too(seen: list, program: Program, tmp_path: Path) -> None:
    out = stepfold.lower(program, "tunable", out=tmp_path / "bundle")
    assert stepfold.load(out).manifest.backend.options == {"level": 1}
    assert stepfold.load(stepfold.lower(program, out=tmp_path / "other")).manifest.backend.options == {
        "provider": "cpu",
        "rows": 5,
    }


@pytest.mark.usefixtures("captured_once")
def test_options_of_the_command_line(seen: list, tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = [("tunable", "level", 4)]
    recipe = {"target": {"backend": "tunable"}, "passes": ["hoist"]}
    optimize(Job(tiny_checkpoint, tmp_path / "bundle", recipe=recipe, settings=settings), silent)
    assert {options for _, options in seen} == {TunableOptions(level=4)}


@pytest.mark.parametrize(
    ("backend", "setting", "message"),
    [
        ("tunable", ("tunable", "levl", 1), "backend tunable: unknown option 'levl'; did you mean 'level'?"),
        ("tunable", ("tunable", "level", "x"), "backend tunable: option 'level': expected a valid integer"),
        (
            "onnxruntime",
            ("tunable", "level", 1),
            "expected an option of a pass or of 'onnxruntime', the engine that is built for; received one of 'tunable'",
        ),
        ("tunabel", ("tunable", "level", 1), "received 'tunabel': did you mean 'tunable'?"),
    ],
)
def test_wrong_options(
    seen: list, tiny_checkpoint: Path, tmp_path: Path, backend: str, setting: tuple[str, str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        optimize(Job(tiny_checkpoint, tmp_path / "bundle", backend=backend, settings=[setting]), silent)
    assert message in str(caught.value)
    assert seen == [] and list(tmp_path.iterdir()) == []


def test_a_name_that_a_pass_and_a_backend_have(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Fuse(Onnxruntime):
        name = "fuse"

    monkeypatch.setattr(registry, "BACKENDS", (*registry.BACKENDS, Fuse()))
    with pytest.raises(
        UsageError, match=r"--set fuse\.rules: expected a pass or a backend; there are both of the name"
    ):
        optimize(Job(tiny_checkpoint, tmp_path / "bundle", settings=[("fuse", "rules", [])]), silent)


def test_options_while_a_schedule_is_fitted(seen: list, program: Program) -> None:
    stepfold.apply(program, {"passes": ["hoist"]}, backend="tunable", options={"level": 2})
    with pytest.raises(UsageError, match="unknown option 'high'"):
        stepfold.apply(program, {"passes": ["hoist"]}, backend="tunable", options={"high": 2})
