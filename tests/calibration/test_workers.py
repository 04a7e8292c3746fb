"""Several processes: work is shared, errors come through, the result is that of one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calibrated import calibrated, content, silent

from stepfold.calibration import workers
from stepfold.calibration.plan import Settings
from stepfold.calibration.run import calibrate, prepare
from stepfold.calibration.workers import Source, Worker, Workers, require_ray
from stepfold.frontend.load import load_checkpoint
from stepfold.ir.program import Program
from stepfold.loop.errors import StepfoldError, UsageError

SAMPLES = 20
RAY = importlib.util.find_spec("ray") is not None


class RayError(Exception):
    """Base class of Ray's errors."""


class RayTaskError(RayError):
    """An error of a worker's own."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


class WorkerDiedError(RayError):
    """A worker is gone."""


@dataclass
class FakeRay:
    """Ray without processes: a call runs when its result is asked for."""

    options: dict[str, Any] = field(default_factory=dict)
    made: list[Any] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    exceptions: Any = field(default_factory=lambda: SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError))

    def init(self, **options: Any) -> None:
        self.options = options

    def shutdown(self) -> None:
        self.events.append("shutdown")

    def remote(self, **options: Any) -> Any:
        assert options == {"num_cpus": 1}

        def actors(kind: type) -> Any:
            def create(*arguments: Any) -> Any:
                worker = kind(*arguments)
                self.made.append(worker)
                call = SimpleNamespace(remote=lambda index: lambda: worker.collect(index))
                return SimpleNamespace(collect=call, worker=worker)

            return SimpleNamespace(remote=create)

        return actors

    def wait(self, busy: list[Any]) -> tuple[list[Any], list[Any]]:
        return busy[-1:], busy[:-1]  # the last one is ready first

    def get(self, call: Any) -> Any:
        try:
            return call()
        except WorkerDiedError:
            raise
        except Exception as error:
            raise RayTaskError(error) from error


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(workers, "require_ray", lambda: None)
    return fake


def source(checkpoint: Path) -> Source:
    return Source(checkpoint, None, Settings(samples=SAMPLES))


def share(program: Program, checkpoint: Path, out: Path, count: int, progress: Any = silent) -> None:
    calibrate(prepare(program, Settings(samples=SAMPLES)), out, progress, Workers(count, source(checkpoint)))


def test_workers_share_the_shards(ray: FakeRay, tiny_program: Program, tiny_checkpoint: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    share(tiny_program, tiny_checkpoint, tmp_path / "shared", 2, lambda *report: told.append(report))
    calibrated(tiny_program, tmp_path / "alone", SAMPLES)
    assert content(tmp_path / "shared") == content(tmp_path / "alone")
    assert len(ray.made) == 2 and ray.options["num_cpus"] == 2 and ray.events == ["shutdown"]
    assert ray.options["address"] == "local"
    assert told == [("calibrating with 2 workers", done, 3) for done in range(4)]


def test_no_more_workers_than_shards(
    ray: FakeRay, tiny_program: Program, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "_prepared", prepare(tiny_program, Settings(samples=SAMPLES)))
    share(tiny_program, tiny_checkpoint, tmp_path, 16)
    assert len(ray.made) == 3


def test_nothing_missing_starts_nothing(
    ray: FakeRay, tiny_program: Program, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    calibrated(tiny_program, tmp_path, SAMPLES)
    (tmp_path / "statistics.safetensors").unlink()
    share(tiny_program, tiny_checkpoint, tmp_path, 2)
    assert ray.made == [] and ray.events == []


def failing(error: Exception) -> Any:
    def collect(self: Worker, index: int) -> None:
        raise error

    return collect


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (StepfoldError("site x: NaN"), StepfoldError, "^site x: NaN$"),
        (UsageError("no checkpoint"), UsageError, "^no checkpoint$"),
        (KeyError("odd"), StepfoldError, r"^a worker failed: KeyError\('odd'\)$"),
        (WorkerDiedError(), StepfoldError, r"^a worker ended early \(WorkerDiedError\), .* with fewer --workers"),
    ],
)
def test_errors_of_workers_come_through(
    ray: FakeRay,
    tiny_program: Program,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(Worker, "collect", failing(error))
    with pytest.raises(kind, match=message):
        share(tiny_program, tiny_checkpoint, tmp_path, 2)
    assert ray.events == ["shutdown"]


def test_a_checkpoint_that_changes_meanwhile(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(StepfoldError, match="the checkpoint changed while it was calibrated"):
        Worker(source(tiny_checkpoint), tmp_path, "another key").collect(0)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"--workers: .*ray, which is not installed: pip install 'stepfold\[distributed\]'"
    ):
        require_ray()


@pytest.mark.slow
@pytest.mark.skipif(not RAY, reason="needs ray: pip install 'stepfold[distributed]'")
def test_two_processes_give_the_bytes_of_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Also when this process runs with more threads than a worker."""
    command = [
        sys.executable,
        "-m",
        "stepfold",
        "calibrate",
        str(tiny_checkpoint),
        "--samples",
        "24",
        "--json",
        "--out",
    ]
    for name, more, threads in (("one", [], "2"), ("two", ["--workers", "2"], "1")):
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [*command, str(tmp_path / name), *more], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["shards"] == {"done": 3, "total": 3}
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.skipif(not RAY, reason="needs ray: pip install 'stepfold[distributed]'")
def test_an_error_in_a_process_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The workers find another checkpoint than the one that was planned."""
    prepared = prepare(load_checkpoint(tiny_checkpoint).capture(), Settings(samples=9))
    with pytest.raises(UsageError, match="none: no such checkpoint folder"):
        calibrate(
            prepared, tmp_path / "store", silent, Workers(2, Source(tmp_path / "none", None, Settings(samples=9)))
        )
