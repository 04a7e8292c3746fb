"""Building again compiles what has changed, and nothing else."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest
import torch
from checkpoints import QUICK
from programs import Modulated, denoiser, modulated_example

import stepfold
from stepfold.backends import Backend, identity
from stepfold.backends.capability import Capability
from stepfold.bundle.cache import Cache
from stepfold.bundle.verify import verify
from stepfold.ir.program import Program, Stage, attribute
from stepfold.loop.options import Options
from stepfold.runtime.compiler import Job, compiled_stages, optimize
from stepfold.runtime.engine import open_stage
from stepfold.runtime.workshop import Workshop


class FakeOptions(Options):
    """Options.

    Attributes:
        level: of the fake.
    """

    level: int = 1


@dataclass(frozen=True)
class FakeBackend(Backend):
    """An engine that builds files of text and runs nowhere; it counts what it builds."""

    name: ClassVar[str] = "fake"
    suffix: ClassVar[str] = ".fake"

    options: FakeOptions = field(default_factory=FakeOptions)
    version: str = "1"
    gpu: str = "none"
    readable: bool = True
    built: list[str] = field(default_factory=list)

    def capability(self) -> Capability:
        return Capability(self.name, True, False, self.version, "", "")

    def lower(self, stage: Stage, folder: Path) -> Path:
        self.built.append(stage.name)
        (folder / f"{stage.name}.more").write_text("more")
        path = folder / f"{stage.name}.fake"
        path.write_text(stage.name)
        return path

    def session(self, *_: Any, **__: Any) -> NoReturn:
        raise AssertionError("it runs nowhere")

    def target(self) -> dict[str, str]:
        return {"gpu": self.gpu}

    def code_folder(self) -> Path | None:
        return super().code_folder() if self.readable else None


class OtherName(FakeBackend):
    name = "other"


FAKE = FakeBackend()


@pytest.fixture(scope="module")
def program() -> Program:
    """Stages of several rates."""
    return stepfold.apply(denoiser(Modulated(), *modulated_example()), {"passes": ["hoist"]})[0]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., dict[str, bool]]:
    """Build the stages of a program in a new workshop; which of them were reused."""
    cache = Cache(tmp_path / "stages", "compiled stage")

    def run(program: Program, backend: Backend = FAKE, cache: Cache | None = cache) -> dict[str, bool]:
        folder = tmp_path / f"shop_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        shop = Workshop(backend, folder, False, cache)
        for stage in program.stages:
            files = shop.build(stage)
            assert [path.name for path in files] == [f"{stage.name}.fake", f"{stage.name}.more"]
            assert all(path.is_file() and path.is_relative_to(folder) for path in files)
        return {stage.name: shop.reused(stage) for stage in program.stages}

    return run


def with_other_weight(program: Program, name: str) -> Program:
    """The program with one bit of one weight of a stage changed."""
    stage = next(stage for stage in program.stages if stage.name == name)
    stage = replace(stage, graph=deepcopy(stage.graph))
    weight = attribute(stage.graph, next(key for key, value in stage.tensors().items() if value.is_floating_point()))
    weight.data.view(-1).view(torch.int32)[0] ^= 1
    return program.with_stage(stage)


def all_stages(program: Program, value: bool) -> dict[str, bool]:
    return {stage.name: value for stage in program.stages}


def test_a_second_build_compiles_nothing(build: Callable, program: Program) -> None:
    assert len(program.stages) > 1
    assert build(program) == all_stages(program, False)
    FAKE.built.clear()
    assert build(program) == all_stages(program, True) and FAKE.built == []


def test_a_program_that_is_made_again_compiles_nothing(build: Callable, program: Program) -> None:
    build(program)
    again = stepfold.apply(denoiser(Modulated(), *modulated_example()), {"passes": ["hoist"]})[0]
    assert build(again) == all_stages(program, True)


def test_another_weight_compiles_one_stage(build: Callable, program: Program) -> None:
    build(program)
    FAKE.built.clear()
    for name in (stage.name for stage in program.stages):
        assert build(with_other_weight(program, name)) == all_stages(program, True) | {name: False}
    assert FAKE.built == [stage.name for stage in program.stages]


CHANGES = {
    "an option": lambda backend: backend.with_options({"level": 2}),
    "the engine's version": lambda backend: replace(backend, version="2"),
    "the GPU": lambda backend: replace(backend, gpu="H100"),
    "the name": lambda backend: OtherName(backend.options),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_else_compiles_everything(build: Callable, program: Program, change: Callable[[Backend], Backend]) -> None:
    build(program)
    assert build(program, change(FAKE)) == all_stages(program, False)
    assert build(program, change(FAKE)) == build(program) == all_stages(program, True)


@pytest.mark.parametrize("part", ["packages", "processor", "code"])
def test_packages_processor_and_code_compile_everything(
    build: Callable, program: Program, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    from stepfold.backends import backend

    build(program)
    monkeypatch.setattr(backend, part, lambda *_: {"other": "1"})
    assert build(program) == all_stages(program, False)


def test_code_is_the_content_of_the_sources(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "lower.py").write_text("a")
    first = identity.code.__wrapped__(engine)
    (engine / "notes.txt").write_text("not code")
    assert identity.code.__wrapped__(engine) == first
    (engine / "lower.py").write_text("b")
    second = identity.code.__wrapped__(engine)
    (engine / "lower.py").rename(engine / "other.py")
    assert len({first, second, identity.code.__wrapped__(engine)}) == 3


def test_the_processor_is_told_by_its_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("model name\t: A\nflags\t\t: sse avx2\n\nmodel name\t: A\nflags\t: sse avx2\n", "Features : asimd\n"):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(identity, "CPU", tmp_path / "cpuinfo")
        found = identity.processor.__wrapped__()
        assert found["instructions"] in ("avx2 sse", "asimd") and found["machine"]
    monkeypatch.setattr(identity, "CPU", tmp_path / "missing")
    assert identity.processor.__wrapped__()["instructions"] == ""


def test_an_engine_whose_code_cannot_be_read_is_not_cached(build: Callable, program: Program) -> None:
    for _ in range(2):
        assert build(program, replace(FAKE, readable=False)) == all_stages(program, False)


def test_without_a_cache_everything_is_compiled(build: Callable, program: Program) -> None:
    for _ in range(2):
        assert build(program, cache=None) == all_stages(program, False)


def test_a_damaged_entry_is_compiled_again(
    build: Callable, program: Program, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(program)
    (step,) = (path for path in (tmp_path / "stages").iterdir() if (path / "step.fake").is_file())
    (step / "step.fake").write_text("step, altered")
    assert build(program) == all_stages(program, True) | {"step": False}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert build(program) == all_stages(program, True)


def test_two_equal_stages_of_one_build_are_no_reuse(tmp_path: Path, program: Program) -> None:
    """The second is taken from the cache, where this build put it."""
    FAKE.built.clear()
    (tmp_path / "shop").mkdir()
    shop = Workshop(FAKE, tmp_path / "shop", False, Cache(tmp_path / "stages", "compiled stage"))
    twin = replace(program.step, graph=deepcopy(program.step.graph))
    for stage in (program.step, twin):
        shop.build(stage)
    assert FAKE.built == ["step"] and not shop.reused(program.step) and not shop.reused(twin)


# -- on an engine


@contextmanager
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of stages that ONNX Runtime is asked to lower."""
    from stepfold.backends.onnxruntime import lower as module

    names: list[str] = []
    real = module.lower
    with monkeypatch.context() as patch:
        patch.setattr(module, "lower", lambda stage, folder, **more: names.append(stage.name) or real(stage, folder, **more))  # fmt: skip
        yield names


@pytest.mark.slow
def test_another_schedule_compiles_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint on: passes give the same stages again, and reference trajectories are read."""
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "cache"))
    recipe = {"passes": ["hoist", {"quantize": {}}, {"fuse": {}}, {"schedule": {**QUICK, "evaluations": 3}}]}
    told: dict[str, set[str]] = {}
    documents: dict[str, dict[str, Any]] = {}
    compiled: dict[str, list[str]] = {}
    for name, evaluations in {"first": 3, "second": 4}.items():
        tasks = told.setdefault(name, set())
        job = Job(tiny_checkpoint, tmp_path / name, recipe, [("schedule", "evaluations", evaluations)])
        with compiling(monkeypatch) as compiled[name]:
            documents[name] = optimize(job, lambda task, done, total, tasks=tasks: tasks.add(task))
    assert {stage["reused"] for stage in documents["first"]["stages"]} == {False} and compiled["first"]
    assert {stage["reused"] for stage in documents["second"]["stages"]} == {True} and compiled["second"] == []
    references = [{task for task in tasks if task.startswith("reference")} for tasks in told.values()]
    assert references[0] and not references[1]
    assert [documents[name]["schedule"]["evaluations"] for name in documents] == [3, 4]
    assert verify(tmp_path / "second", open_stage) == ([], [])
    stages = [json.loads((tmp_path / name / "manifest.json").read_text())["files"] for name in documents]
    assert stages[0]["stages/step.onnx"] == stages[1]["stages/step.onnx"]


BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from programs import Modulated, denoiser, modulated_example
import stepfold
program = denoiser(Modulated(), *modulated_example())
print("ready", flush=True)
sys.stdin.readline()
stepfold.lower(program, out=sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both compile the stage, one of them stores it; their bundles are valid and equal."""
    environment = {**os.environ, "STEPFOLD_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", BUILD, str(Path(__file__).resolve().parents[1])]
    outs = [tmp_path / "a", tmp_path / "b"]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    processes = [subprocess.Popen([*command, str(out)], env=environment, **pipes) for out in outs]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "made again" not in errors
    for out in outs:
        assert verify(out, open_stage) == ([], [])
    files = [json.loads((out / "manifest.json").read_text())["files"] for out in outs]
    assert files[0] == files[1]
    assert len(list((tmp_path / "cache" / "stages").iterdir())) == 1


def test_the_cache_lies_beside_the_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path))
    assert compiled_stages().folder == tmp_path / "stages"
