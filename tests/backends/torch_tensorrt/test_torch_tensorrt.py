"""What is asked of Torch-TensorRT and what becomes of its plans, with stand-ins for the package and the GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stages import STAGES

from stepfold.backends import get
from stepfold.backends.tensorrt.cuda import Gpu
from stepfold.backends.tensorrt.description import PlanDescription
from stepfold.backends.tensorrt.provider import Provider
from stepfold.backends.torch_tensorrt import capability, lower
from stepfold.backends.torch_tensorrt.options import TorchTensorrtOptions
from stepfold.loop.errors import StepfoldError, UsageError

ADA = Gpu(0, "NVIDIA L4", "SM89")
OPTIONS = TorchTensorrtOptions(max_batch=16, workspace_mib=2)


class Converter(SimpleNamespace):
    """Remembers what it was asked for; its plans have names of their own."""

    def __init__(self) -> None:
        super().__init__(asked=None, error=None, names=["arg_x", "arg_k", "arg_v", "output0"])
        self.dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=self._convert)
        self.Input = lambda **values: values
        self.TensorIOMode = SimpleNamespace(INPUT="input")
        self.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=self._engine)

    def _convert(self, exported: Any, **values: Any) -> bytes:
        if self.error is not None:
            raise self.error
        self.asked = (exported, values)
        return b"plan"

    def _engine(self, plan: bytes) -> Any:
        assert plan == b"plan"
        return SimpleNamespace(
            num_io_tensors=len(self.names),
            get_tensor_name=lambda i: self.names[i],
            get_tensor_mode=lambda name: "input" if name.startswith("arg") else "output",
        )


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Converter:
    module = Converter()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    monkeypatch.setattr(lower, "on_gpu", lambda exported: exported)
    monkeypatch.setattr(lower, "gpus", lambda: ([ADA], ""))
    monkeypatch.setattr(lower, "logger", lambda tensorrt: None)
    monkeypatch.setattr(Provider, "load", lambda self: module)
    monkeypatch.setattr(Provider, "version", property(lambda self: "11.0"))
    return module


def test_a_plan_and_its_description(converter: Converter, tmp_path: Path) -> None:
    stage = STAGES["attention"][1]
    file = lower.lower(stage, tmp_path, options=OPTIONS)
    assert (file.name, file.read_bytes()) == ("one.engine", b"plan")
    exported, values = converter.asked
    assert isinstance(exported, torch.export.ExportedProgram)
    assert not [node for node in exported.graph.nodes if "stepfold" in str(node.target)]
    assert values["workspace_size"] == 2 << 20 and values["require_full_compilation"]
    first = values["arg_inputs"][0]
    assert (first["min_shape"], first["opt_shape"], first["max_shape"]) == ((1, 3, 8), (8, 3, 8), (16, 3, 8))
    assert first["dtype"] is torch.float32
    plan = PlanDescription.read(file)
    assert (plan.provider, plan.provider_version, plan.capability) == ("tensorrt", "11.0", "SM89")
    assert plan.tensors == {"q": "arg_x", "k": "arg_k", "v": "arg_v", "y0": "output0"}
    assert plan.tensor("q") == "arg_x" and plan.tensor("other") == "other"
    assert plan.input_ports() == stage.inputs and plan.output_ports() == stage.outputs


def test_half_precision_is_that_of_the_stage(converter: Converter, tmp_path: Path) -> None:
    lower.lower(STAGES["attention"][1], tmp_path, options=TorchTensorrtOptions(precision="fp16"))
    exported, _ = converter.asked
    assert torch.float16 in {
        getattr(node.meta["val"], "dtype", None) for node in exported.graph.nodes if node.op == "call_function"
    }


def test_quantized_layers_are_refused(converter: Converter, tmp_path: Path) -> None:
    with pytest.raises(StepfoldError, match=r"stepfold\.qlinear\.default has no lowering for this engine"):
        lower.lower(STAGES["qlinear"][1], tmp_path, options=OPTIONS)


def test_what_it_refuses_is_told(converter: Converter, tmp_path: Path) -> None:
    converter.error = RuntimeError("no converter for aten.det\nmore")
    with pytest.raises(StepfoldError, match=r"stage one: Torch-TensorRT cannot build it: no converter for aten\.det$"):
        lower.lower(STAGES["rotary"][1], tmp_path, options=OPTIONS)
    assert not list(tmp_path.iterdir())


def test_an_input_that_was_dropped_is_noticed(converter: Converter, tmp_path: Path) -> None:
    converter.names = ["arg_x", "output0"]
    with pytest.raises(StepfoldError, match="expected a plan with the inputs q, k, v; it has arg_x"):
        lower.lower(STAGES["attention"][1], tmp_path, options=OPTIONS)


@pytest.mark.parametrize(
    ("modules", "gpu", "expected"),
    [
        ((), None, (False, False, "no NVIDIA GPU was found")),
        ((), ADA, (False, False, "tensorrt is not installed")),
        (("tensorrt", "torch"), ADA, (False, True, "building needs torch_tensorrt")),
        (("tensorrt", "torch", "torch_tensorrt"), ADA, (True, True, "")),
    ],
)
def test_machines(
    monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...], gpu: Gpu | None, expected: tuple[bool, bool, str]
) -> None:
    monkeypatch.setattr(capability, "installed", lambda name: name in modules)
    monkeypatch.setattr(capability, "gpus", lambda: ([gpu], "") if gpu else ([], "no NVIDIA GPU was found"))
    monkeypatch.setattr(Provider, "is_installed", property(lambda self: self.name in modules))
    found = capability.capability()
    assert (found.can_build, found.can_run, found.reason) == expected and "torch-tensorrt" in found.install
    assert capability.target(OPTIONS)["gpu"] == ("NVIDIA L4 SM89" if gpu else None)


def test_here_it_says_what_is_missing(tmp_path: Path) -> None:
    found = get("torch_tensorrt").capability()
    if found.can_run:
        pytest.skip("this machine has a GPU and TensorRT")
    with pytest.raises(UsageError, match="backend 'torch_tensorrt' cannot run here"):
        get("torch_tensorrt").open_session(tmp_path / "none.engine", (), ())
