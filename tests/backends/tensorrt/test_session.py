"""What a session does around TensorRT: checks, memory, streams and graphs, over a driver that computes on the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorrt_fakes import FakeCuda, FakeTensorrt

from stepfold.backends.tensorrt import cuda as driver_module
from stepfold.backends.tensorrt import provider as provider_module
from stepfold.backends.tensorrt import session
from stepfold.backends.tensorrt.cuda import Driver, Gpu
from stepfold.backends.tensorrt.description import Batch, PlanDescription
from stepfold.backends.tensorrt.provider import RTX, Provider
from stepfold.bundle.manifest import PortEntry
from stepfold.loop.errors import BundleError, StepfoldError, UsageError
from stepfold.loop.ports import Port

INPUTS = (Port("x", (None, 3), "float32"), Port("c", (3,), "float32"))
OUTPUTS = (Port("y", (None, 3), "float32"),)
C = np.array([1, 2, 3], np.float32)


class Installed(Provider):
    version = "1.0"  # type: ignore[assignment]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(session, "open_driver", lambda: Driver(fake))
    return fake


@pytest.fixture
def tensorrt(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorrt:
    module = FakeTensorrt(cuda)
    here = Installed("tensorrt_rtx", (), "pip install it", True, False, None)
    monkeypatch.setattr(session, "PROVIDERS", (here,))
    monkeypatch.setattr(Installed, "load", lambda self: module)
    provider_module.logger.cache_clear()
    return module


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "step.engine"
    path.write_bytes(b"plan")
    described().write(path)
    return path


def described(**changes: object) -> PlanDescription:
    plan = PlanDescription(
        provider="tensorrt_rtx",
        provider_version="1.0",
        capability="SM89",
        precision="fp32",
        batch=Batch(min=1, opt=2, max=4),
        inputs=tuple(PortEntry.of(port) for port in INPUTS),
        outputs=tuple(PortEntry.of(port) for port in OUTPUTS),
        layers=(),
    )
    return plan.model_copy(update=changes)


def rows(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 3)).astype(np.float32), "c": C}


def test_calls_of_many_batches(file: Path, tensorrt: FakeTensorrt) -> None:
    call = session.open_session(file, INPUTS, OUTPUTS)
    for seed, batch in enumerate([1, 1, 1, 4, 4, 2, 1, 1, 4]):
        values = rows(batch, seed)
        (y,) = call(values)
        assert np.array_equal(y, 2 * values["x"] + C)


def test_the_second_call_is_recorded_and_the_third_replayed(file: Path, cuda: FakeCuda, tensorrt: FakeTensorrt) -> None:
    call = session.open_session(file, INPUTS, OUTPUTS)
    call(rows(2))
    assert "cuStreamBeginCapture" not in cuda.calls
    call(rows(2))
    call(rows(2))
    assert cuda.calls.count("cuGraphInstantiateWithFlags") == 1 and cuda.calls.count("cuGraphLaunch") == 2
    call(rows(3))
    assert cuda.calls.count("cuGraphExecDestroy") == 1 and cuda.calls.count("cuGraphLaunch") == 2


@pytest.mark.parametrize(("capturable", "launches"), [(False, 0), (True, 2), (None, 2)])
def test_what_cannot_be_recorded_runs_as_it_is(
    file: Path, cuda: FakeCuda, tensorrt: FakeTensorrt, capturable: bool | None, launches: int
) -> None:
    tensorrt.capturable = capturable
    call = session.open_session(file, INPUTS, OUTPUTS)
    for _ in range(3):
        assert np.array_equal(call(rows(2))[0], 2 * rows(2)["x"] + C)
    assert cuda.calls.count("cuGraphLaunch") == launches


def test_memory_grows_and_is_given_back(file: Path, cuda: FakeCuda, tensorrt: FakeTensorrt) -> None:
    call = session.open_session(file, INPUTS, OUTPUTS)
    call(rows(1))
    assert len(cuda.memory) == 3 and cuda.calls.count("cuMemAlloc") == 3
    call(rows(4))
    assert len(cuda.memory) == 3 and cuda.calls.count("cuMemAlloc") == 5  # `c` has no batch
    call(rows(2))
    assert cuda.calls.count("cuMemAlloc") == 5
    del call
    assert not cuda.memory and "cuStreamDestroy" in cuda.calls


def test_input_that_is_not_contiguous(file: Path, tensorrt: FakeTensorrt) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[:2]
    (y,) = session.open_session(file, INPUTS, OUTPUTS)({"x": x, "c": C})
    assert np.array_equal(y, 2 * x + C)


def test_a_batch_outside_of_the_profile(file: Path, tensorrt: FakeTensorrt) -> None:
    call = session.open_session(file, INPUTS, OUTPUTS)
    with pytest.raises(StepfoldError, match=r"expected a batch of 1 to 4, .*received 5.*tensorrt.max_batch=5"):
        call(rows(5))


@pytest.mark.parametrize(
    ("x", "received"),
    [
        (np.zeros((2, 4), np.float32), r"received \[2, 4\] float32"),
        (np.zeros((2, 3, 1), np.float32), r"received \[2, 3, 1\] float32"),
        (np.zeros((2, 3)), r"received \[2, 3\] float64"),
    ],
)
def test_a_value_that_does_not_fit(file: Path, tensorrt: FakeTensorrt, x: np.ndarray, received: str) -> None:
    with pytest.raises(StepfoldError, match=r"expected x \[B, 3\] float32; " + received):
        session.open_session(file, INPUTS, OUTPUTS)({"x": x, "c": C})


def test_inputs_of_different_batches(tmp_path: Path, tensorrt: FakeTensorrt) -> None:
    ports = (Port("x", (None, 3), "float32"), Port("c", (None, 3), "float32"))
    path = tmp_path / "two.engine"
    path.write_bytes(b"plan")
    described(inputs=tuple(PortEntry.of(port) for port in ports)).write(path)
    call = session.open_session(path, ports, OUTPUTS)
    with pytest.raises(StepfoldError, match=r"expected one batch for all inputs; received {'x': 2, 'c': 3}"):
        call({"x": np.zeros((2, 3), np.float32), "c": np.zeros((3, 3), np.float32)})


def test_a_shape_tensorrt_refuses(file: Path, tensorrt: FakeTensorrt) -> None:
    tensorrt.accepts = False
    with pytest.raises(StepfoldError, match=r"step.engine: tensorrt_rtx refused the shape of 'x'"):
        session.open_session(file, INPUTS, OUTPUTS)(rows(1))


def test_memory_of_the_gpu_runs_out(file: Path, cuda: FakeCuda, tensorrt: FakeTensorrt) -> None:
    call = session.open_session(file, INPUTS, OUTPUTS)
    cuda.fails["cuMemAlloc"] = driver_module.OUT_OF_MEMORY
    with pytest.raises(StepfoldError, match=r"cuMemAlloc_v2 failed: words of 2\. Use a smaller batch"):
        call(rows(1))
    cuda.fails.clear()
    assert np.array_equal(call(rows(1))[0], 2 * rows(1)["x"] + C)


def test_a_plan_that_cannot_be_loaded(file: Path, tensorrt: FakeTensorrt) -> None:
    tensorrt.loads = False
    with pytest.raises(BundleError, match=r"tensorrt_rtx 1.0 cannot load it: magic tag does not match. Build it again"):
        session.open_session(file, INPUTS, OUTPUTS)


def test_another_device(file: Path) -> None:
    with pytest.raises(UsageError, match="device: expected cuda, the only one of TensorRT; received 'cpu'"):
        session.open_session(file, INPUTS, OUTPUTS, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provider_version": "0.9"}, "built by tensorrt_rtx 0.9; here is 1.0. Install that version, or build"),
        (
            {"capability": "SM120"},
            "built for SM120; the GPU here is NVIDIA Test, SM89. Build the bundle again with --set",
        ),
    ],
)
def test_a_plan_of_another_target_is_not_read(
    file: Path, tensorrt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
) -> None:
    described(**changes).write(file)
    file.unlink()  # nothing of the plan itself is looked at
    with pytest.raises(UsageError, match=message):
        session.open_session(file, INPUTS, OUTPUTS)


def test_a_plan_of_an_unknown_provider(file: Path, tensorrt: FakeTensorrt) -> None:
    described(provider="tensorrt_next").write(file)
    with pytest.raises(BundleError, match="expected a plan of tensorrt_rtx; 'tensorrt_next'"):
        session.open_session(file, INPUTS, OUTPUTS)


def test_a_machine_without_a_gpu() -> None:
    with pytest.raises(UsageError, match="built for a GPU of SM89; the NVIDIA driver here reports none"):
        session.check_target(Path("a"), described(provider_version=RTX.version), RTX, [])


def test_a_gpu_that_fits() -> None:
    session.check_target(Path("a"), described(provider_version=RTX.version), RTX, [Gpu(0, "x", "SM89")])


@pytest.mark.parametrize(
    ("inputs", "outputs", "kind"),
    [((INPUTS[0],), OUTPUTS, "inputs"), (INPUTS, (replace(OUTPUTS[0], dtype="float16"),), "outputs")],
)
def test_a_plan_with_other_ports(file: Path, inputs: tuple, outputs: tuple, kind: str) -> None:
    with pytest.raises(BundleError, match=f"expected the {kind} .*; received .* Build the bundle again"):
        session.open_session(file, inputs, outputs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "validation error"),
        (
            described().model_dump_json().replace('"format_version":1', '"format_version":2'),
            "expected format 1 or older",
        ),
    ],
)
def test_a_damaged_description(file: Path, content: str | None, message: str) -> None:
    PlanDescription.beside(file).unlink()
    if content is not None:
        PlanDescription.beside(file).write_text(content)
    with pytest.raises(BundleError, match=message):
        session.open_session(file, INPUTS, OUTPUTS)
