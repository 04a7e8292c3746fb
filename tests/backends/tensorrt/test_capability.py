"""What TensorRT can do on a machine: providers that are there or not, GPUs that fit or not."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from tensorrt_fakes import FakeCuda
from tensorrt_stages import needs_rtx

from stepfold.backends.registry import get
from stepfold.backends.tensorrt import capability as module
from stepfold.backends.tensorrt import cuda, provider, timings
from stepfold.backends.tensorrt.cuda import Driver, Gpu
from stepfold.backends.tensorrt.options import TensorrtOptions
from stepfold.backends.tensorrt.provider import CLASSIC, RTX, Message, Provider
from stepfold.loop.errors import StepfoldError, UsageError

ADA = Gpu(0, "NVIDIA L4", "SM89")
HOPPER = Gpu(0, "NVIDIA H100", "SM90")
NONE = "no NVIDIA GPU was found"
SM89, ANY = TensorrtOptions(capability="SM89"), TensorrtOptions()
CLASSIC_OPTIONS = TensorrtOptions(provider="tensorrt")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets which modules are installed and which GPU there is."""

    def make(*modules: str, gpu: Gpu | None = None) -> None:
        present = {"torch", "onnx", "onnx_ir", "onnxscript", *modules}
        monkeypatch.setattr(provider, "installed", lambda name: name in present)
        monkeypatch.setattr(
            module, "installed", lambda name: name in present - {f"no {name}"} and f"no {name}" not in present
        )
        monkeypatch.setattr(module, "gpus", lambda: ([gpu], "") if gpu else ([], NONE))
        monkeypatch.setattr(provider, "version_of", lambda names: "1.0")

    return make


@pytest.mark.parametrize(
    ("modules", "gpu", "expected"),
    [
        ((), ADA, (False, False, "tensorrt_rtx is not installed")),
        (("tensorrt_rtx",), None, (True, False, f"running: {NONE}")),
        (("tensorrt_rtx",), ADA, (True, True, "")),
        (
            ("tensorrt_rtx",),
            HOPPER,
            (True, False, "running: tensorrt_rtx runs on SM75, SM80, SM86, SM89, SM120, SM121; "),
        ),
        (("tensorrt_rtx", "no torch"), ADA, (False, True, "building needs torch")),
        (("tensorrt",), None, (False, False, f"{NONE}; running: {NONE}")),
        (("tensorrt",), HOPPER, (True, True, "")),
    ],
)
def test_machines(machine: Any, modules: tuple[str, ...], gpu: Gpu | None, expected: tuple[bool, bool, str]) -> None:
    machine(*modules, gpu=gpu)
    found = module.capability()
    assert (found.can_build, found.can_run) == expected[:2]
    assert found.reason.startswith(expected[2]) and bool(found.reason) == bool(expected[2])
    assert "pip install" in found.install


@pytest.mark.parametrize(
    ("options", "modules", "gpu", "expected"),
    [
        (SM89, ("tensorrt_rtx",), None, (True, False, f"running: {NONE}")),
        (SM89, ("tensorrt_rtx",), ADA, (True, True, "")),
        (
            SM89,
            ("tensorrt_rtx",),
            Gpu(0, "RTX 5090", "SM120"),
            (True, False, "running: the engine is for SM89; the GPU "),
        ),
        (
            ANY,
            ("tensorrt_rtx",),
            None,
            (False, False, f"{NONE}; name the compute capability to build for, as in --set "),
        ),
        (ANY, ("tensorrt_rtx",), ADA, (True, True, "")),
        (CLASSIC_OPTIONS, ("tensorrt_rtx",), ADA, (False, False, "tensorrt is not installed")),
        (CLASSIC_OPTIONS, ("tensorrt",), HOPPER, (True, True, "")),
        (SM89, ("tensorrt",), ADA, (False, True, "tensorrt builds for the GPU of this machine only; leave tensorrt.")),
    ],
)
def test_machines_with_options(
    machine: Any,
    options: TensorrtOptions,
    modules: tuple[str, ...],
    gpu: Gpu | None,
    expected: tuple[bool, bool, str],
) -> None:
    machine(*modules, gpu=gpu)
    found = module.capability_for(options)
    assert (found.can_build, found.can_run) == expected[:2]
    assert found.reason.startswith(expected[2]) and bool(found.reason) == bool(expected[2])


def test_finding_out_imports_nothing_heavy() -> None:
    code = (
        "import sys; from stepfold.backends.registry import get; get('tensorrt').capability(); "
        "sys.exit(bool({'tensorrt_rtx', 'tensorrt', 'torch', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_capability_is_refused_with_the_list() -> None:
    with pytest.raises(
        UsageError, match=r"option 'capability': expected 'SM75', .*'SM120' or 'SM121'; received 'SM90'"
    ):
        get("tensorrt").with_options({"capability": "SM90"})


def test_batches_in_order() -> None:
    with pytest.raises(ValidationError, match="rising order; received 1, 8 and 4"):
        TensorrtOptions(max_batch=4)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        UsageError, match=r"tensorrt_rtx cannot be used here: .*Install it: pip install 'stepfold\[tensorrt\]'"
    ):
        RTX.load()


@needs_rtx
def test_the_installed_provider_has_every_capability() -> None:
    members = set(RTX.load().ComputeCapability.__members__)
    assert set(provider.CAPABILITIES) <= members


def test_the_driver_reports_gpus() -> None:
    driver = Driver(FakeCuda([("NVIDIA L4", 8, 9), ("NVIDIA RTX PRO", 12, 0)]))
    assert driver.gpus() == [Gpu(0, "NVIDIA L4", "SM89"), Gpu(1, "NVIDIA RTX PRO", "SM120")]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library that a process finds as its driver; None is none."""

    def find(fake: FakeCuda | None) -> None:
        def load(name: str) -> FakeCuda:
            if fake is None:
                raise OSError(name)
            return fake

        monkeypatch.setattr(ctypes, "CDLL", load)
        cuda.open_driver.cache_clear()

    yield find
    cuda.open_driver.cache_clear()


def test_no_driver(library: Any) -> None:
    library(None)
    assert cuda.gpus() == ([], "no NVIDIA GPU was found: its driver (libcuda.so.1) is not installed")


def test_a_driver_that_does_not_start(library: Any) -> None:
    fake = FakeCuda()
    fake.fails["cuInit"] = 100
    library(fake)
    assert cuda.gpus() == ([], "no NVIDIA GPU works here: CUDA: cuInit failed: words of 100")


def test_a_driver_without_gpus(library: Any) -> None:
    library(FakeCuda([]))
    assert cuda.gpus() == ([], "the NVIDIA driver reports no GPU")


class FakeConfig:
    """A builder configuration of classic TensorRT; `bad` is what it says of a damaged cache."""

    def __init__(self, messages: list[Message], *, matches: bool = True):
        self.messages, self.matches, self.cache = messages, matches, b""

    def create_timing_cache(self, data: bytes) -> bytes:
        if data.startswith(b"damaged"):
            self.messages.append(
                Message("WARNING", "Failed to deserialize timing cache. Returning an empty timing cache.")
            )
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        accepted = self.matches or cache == b""
        self.cache = cache if accepted else self.cache
        return accepted

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.cache + b" and new")


@pytest.mark.parametrize(
    ("content", "matches", "used", "warned"),
    [(b"good", True, b"good", 0), (None, True, b"", 0), (b"damaged", True, b"", 1), (b"foreign", False, b"", 1)],
)
def test_timing_caches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, matches: bool, used: bytes, warned: int
) -> None:
    path = tmp_path / "timings"
    if content is not None:
        path.write_bytes(content)
    messages: list[Message] = []
    config = FakeConfig(messages, matches=matches)
    timings.use_timings(config, CLASSIC, path, messages)
    assert config.cache == used
    found = [record.getMessage() for record in caplog.records if record.name.startswith("stepfold")]
    assert found == [f"{path}: ignored: it is no timing cache of this tensorrt and this GPU."] * warned
    timings.keep_timings(config, CLASSIC, path)
    assert path.read_bytes() == used + b" and new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_timing_cache_that_is_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = FakeConfig([])
    timings.use_timings(config, CLASSIC, tmp_path, [])
    assert "the timing cache cannot be read: Is a directory" in caplog.text
    with pytest.raises(StepfoldError, match="expected a file that can be written; received: Is a directory"):
        timings.keep_timings(config, CLASSIC, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_provider_by_name() -> None:
    found: list[Provider] = [provider.provider("tensorrt_rtx"), provider.provider("tensorrt")]
    assert found == [RTX, CLASSIC]
