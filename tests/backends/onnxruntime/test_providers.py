"""Providers of ONNX Runtime: which one a session asks for, buffers that are bound, and what a GPU has no kernel for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from programs import modulated, modulated_example
from stages import STAGES
from threads import at_once

import stepfold
from stepfold.backends import get
from stepfold.backends.onnxruntime import capability, session
from stepfold.backends.onnxruntime.lower import lower
from stepfold.backends.onnxruntime.options import OnnxruntimeOptions
from stepfold.ir.program import Program, Stage, reference
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.runtime.workshop import workshop

CPU, CUDA, TENSORRT = session.CPU, session.CUDA, session.TENSORRT
EVERYTHING = [TENSORRT, CUDA, CPU]


def options(provider: str) -> OnnxruntimeOptions:
    return OnnxruntimeOptions.model_validate({"provider": provider})


@pytest.mark.parametrize(
    ("provider", "device", "expected"),
    [
        ("cpu", "cpu", (CPU,)),
        ("cpu", "cuda", (CUDA,)),
        ("cuda", "cuda", (CUDA,)),
        ("cuda", "cpu", (CPU,)),
        ("tensorrt", "cuda", (TENSORRT, CUDA)),
        ("tensorrt", "cpu", (CPU,)),
    ],
)
def test_the_device_of_a_session_wins_over_the_provider(provider: str, device: str, expected: tuple[str, ...]) -> None:
    assert session.providers(device, options(provider), EVERYTHING) == expected


def test_tensorrt_without_cuda_behind_it() -> None:
    assert session.providers("cuda", options("tensorrt"), [TENSORRT, CPU]) == (TENSORRT,)


@pytest.mark.parametrize(("provider", "name"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_a_provider_that_the_package_lacks(provider: str, name: str) -> None:
    with pytest.raises(UsageError, match=rf"has no {name}, only {CPU}\. Replace it: .* pip install onnxruntime-gpu"):
        session.providers("cuda", options(provider), [CPU])


@pytest.mark.parametrize(("provider", "device"), [("cpu", "cpu"), ("cuda", "cuda"), ("tensorrt", "cuda")])
def test_the_option_decides_the_device(provider: str, device: str) -> None:
    assert get("onnxruntime").with_options({"provider": provider}).default_device == device


def test_an_unknown_provider() -> None:
    with pytest.raises(UsageError, match="option 'provider': expected 'cpu', 'cuda' or 'tensorrt'; received 'rocm'"):
        get("onnxruntime").with_options({"provider": "rocm"})


# -- sessions


@pytest.fixture(scope="module")
def stage() -> Stage:
    return modulated().step


@pytest.fixture(scope="module")
def file(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lower(stage, tmp_path_factory.mktemp("stage"))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every provider is offered and starts; sessions run on the CPU. What they were asked to run on."""
    asked: list[list[str]] = []
    real = onnxruntime.InferenceSession

    class Pretended:
        def __init__(self, path: str, settings: Any, providers: list[str], **_: Any):
            asked.append(providers)
            self._real = real(path, settings, providers=[CPU])

        def get_providers(self) -> list[str]:
            return [*asked[-1], CPU]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Pretended)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: EVERYTHING)
    return asked


def bound(file: Path, stage: Stage) -> session.BoundSession:
    found = onnxruntime.InferenceSession(str(file), session.session_options(1), providers=[CPU])
    return session.BoundSession(found, file.name, stage.inputs, stage.outputs, "cpu")


def values(stage: Stage, batch: int) -> dict[str, np.ndarray]:
    return {item.name: value.numpy() for item, value in zip(stage.inputs, modulated_example(batch), strict=True)}


def test_bound_buffers_give_what_the_reference_gives(file: Path, stage: Stage) -> None:
    call = bound(file, stage)
    for batch in (2, 2, 1, 5, 2):
        feed = values(stage, batch)
        np.testing.assert_allclose(call(feed)[0], reference(stage)(feed)[0], rtol=1e-5, atol=1e-6)


def test_arrays_stay_those_of_the_caller(file: Path, stage: Stage) -> None:
    """A second call writes into the buffers of the first, and into no array that was given or returned."""
    call, first, second = bound(file, stage), values(stage, 2), values(stage, 2)
    second["x"] = 3 * second["x"]
    kept = {name: value.copy() for name, value in first.items()}
    (before,) = call(first)
    copy = before.copy()
    (after,) = call(second)
    np.testing.assert_array_equal(before, copy)
    assert (after != before).any()
    for name, value in kept.items():
        np.testing.assert_array_equal(first[name], value)


def test_a_buffer_is_used_again_for_its_shape(file: Path, stage: Stage) -> None:
    call = bound(file, stage)
    call(values(stage, 2))
    held = call._buffers["x"][1]
    call(values(stage, 2))
    assert call._buffers["x"][1] is held
    call(values(stage, 3))
    assert call._buffers["x"][1] is not held


def test_strided_arrays(file: Path, stage: Stage) -> None:
    feed = values(stage, 2)
    strided = {**feed, "x": np.repeat(feed["x"], 2, axis=-1)[..., ::2]}
    np.testing.assert_array_equal(bound(file, stage)(strided)[0], bound(file, stage)(feed)[0])


def test_a_run_that_fails_says_what_it_was_given_and_does_no_harm(file: Path, stage: Stage) -> None:
    call = bound(file, stage)
    with pytest.raises(StepfoldError, match=r"step\.onnx: ONNX Runtime failed on x \[2, 3, 6\] float32, t \[2\]"):
        call({**values(stage, 2), "x": np.zeros((2, 3, 6), np.float32)})
    feed = values(stage, 2)
    np.testing.assert_allclose(call(feed)[0], reference(stage)(feed)[0], rtol=1e-5, atol=1e-6)


def test_threads_that_share_a_bound_session_take_turns(file: Path, stage: Stage) -> None:
    call, wrong = bound(file, stage), []
    expected = {batch: reference(stage)(values(stage, batch))[0] for batch in (1, 2, 3)}

    def work(batch: int) -> None:
        for _ in range(30):
            if not np.allclose(call(values(stage, batch))[0], expected[batch], atol=1e-5):
                wrong.append(batch)

    at_once(work, (1, 2, 3))
    assert wrong == []


@pytest.mark.parametrize(("provider", "names"), [("cuda", [CUDA]), ("tensorrt", [TENSORRT, CUDA])])
def test_a_gpu_has_a_bound_session(
    file: Path, stage: Stage, pretended: list[list[str]], provider: str, names: list[str]
) -> None:
    opened = get("onnxruntime").with_options({"provider": provider}).open_session(file, stage.inputs, stage.outputs)
    assert isinstance(opened, session.BoundSession) and pretended == [names]
    on_cpu = get("onnxruntime").with_options({"provider": provider})
    call = on_cpu.open_session(file, stage.inputs, stage.outputs, device="cpu")
    assert not isinstance(call, session.BoundSession) and pretended[1:] == [[CPU]]


# -- building


def test_what_is_missing_for_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    found = capability.capability_for(options("cuda"))
    assert (found.can_build, found.can_run) == (True, False)
    assert found.reason == f"running: the installed onnxruntime has no {CUDA}, only {CPU}"
    assert found.install.endswith("pip install onnxruntime-gpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: EVERYTHING)
    monkeypatch.setattr(capability.driver, "gpus", lambda: ([], "no NVIDIA GPU was found"))
    assert capability.capability_for(options("tensorrt")).reason == "running: no NVIDIA GPU was found"
    monkeypatch.setattr(capability.driver, "gpus", lambda: (["a GPU"], ""))
    assert capability.capability_for(options("tensorrt")) == capability.capability()
    assert capability.capability_for(options("cpu")).can_run


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_integers_have_no_kernel_on_a_gpu(tmp_path: Path, provider: str) -> None:
    with pytest.raises(StepfoldError) as caught:
        lower(STAGES["qlinear"][1], tmp_path, options=options(provider))
    text = str(caught.value)
    assert f"expected operators that the provider {provider!r} has; stepfold.qlinear.default and 0 more" in text
    assert "--recipe fp32" in text and list(tmp_path.iterdir()) == []


def test_a_bundle_for_a_gpu_is_built_without_one(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch stands in; the files are those of the CPU, and run there when asked to."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    program: Program = modulated()
    with workshop("onnxruntime", {"provider": "cuda"}) as shop:
        assert not shop.runs
    out = stepfold.lower(program, "onnxruntime", out=tmp_path / "bundle", options={"provider": "cuda"})
    with pytest.raises(UsageError, match=f"has no {CUDA}"):
        stepfold.load(out)
    engine = stepfold.load(out, device="cpu", threads=1)
    entry = engine.manifest.backend
    assert (entry.device, entry.options["provider"]) == ("cuda", "cuda")
    inputs = {name: value.numpy() for name, value in program.example.items()}
    np.testing.assert_allclose(engine.run(**inputs)[0], program.bind().evaluate(inputs)[0], rtol=1e-4, atol=1e-5)
