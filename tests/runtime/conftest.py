"""A model on its way to a bundle, and stages that are compiled once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import QUICK
from programs import Modulated, loop_around, modulated_example

import stepfold
from stepfold.ir.program import Program, Stage


@pytest.fixture(scope="session")
def compiled_stages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Stage, Callable[..., Path]], Path]:
    """Compiles a stage with the function that is given, or finds what it made of this stage before."""
    folder, made = tmp_path_factory.mktemp("stages"), dict[int, tuple[Stage, Path]]()

    def compiled(stage: Stage, lower: Callable[..., Path]) -> Path:
        if id(stage) not in made:  # the stage is held, so that its number stays its own
            kept = folder / str(len(made))
            kept.mkdir()
            made[id(stage)] = (stage, lower(stage, kept))
        return made[id(stage)][1]

    return compiled


@pytest.fixture
def each_stage_once(compiled_stages: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that several tests compile are compiled once: a stage never changes."""
    from stepfold.backends.onnxruntime import lower as module

    real = module.lower

    def lower(stage: Stage, folder: Path, **_: Any) -> Path:
        file = compiled_stages(stage, real)
        return Path(shutil.copyfile(file, folder / file.name))

    monkeypatch.setattr(module, "lower", lower)


@pytest.fixture(scope="session")
def model() -> Modulated:
    return Modulated()


@pytest.fixture(scope="session")
def captured(model: Modulated) -> Program:
    x, t, c = modulated_example()
    return stepfold.capture(model, {"x": x, "t": t, "c": c}, loop_around(["x", "t", "c"], (3, 5)))


@pytest.fixture(scope="session")
def fitted(captured: Program) -> Program:
    return stepfold.apply(captured, {"passes": ["hoist", {"schedule": {**QUICK, "evaluations": 2}}]}, seed=4)[0]
