"""Bundles of TensorRT plans made where none can run: fitted on PyTorch, refused to be run, and never deserialized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import denoiser, modulated
from tensorrt_stages import needs_rtx
from zoo import DIT, FLUX, PIXART, QWENIMAGE, SD3, UNET, ZooModel

import stepfold
from stepfold.backends import get
from stepfold.backends.onnxruntime.backend import Onnxruntime
from stepfold.backends.tensorrt.description import PlanDescription
from stepfold.backends.tensorrt.lower import lower
from stepfold.backends.tensorrt.options import TensorrtOptions
from stepfold.bundle.manifest import Manifest
from stepfold.bundle.probe import TOLERANCE, Probe
from stepfold.bundle.reader import read
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.passes.base import silent
from stepfold.runtime.compiler import Job, optimize
from stepfold.runtime.workshop import workshop

MNIST = Path(__file__).resolve().parents[3] / "examples" / "mnist_dit"
SM89: dict[str, Any] = {"capability": "SM89"}

no_gpu = pytest.mark.skipif(get("tensorrt").capability().can_run, reason="a GPU here runs TensorRT")


def types(folder: Path, stage: str) -> set[str]:
    plan = PlanDescription.read(folder / "stages" / f"{stage}.engine")
    return {name for layer in plan.layers if layer.kind == "MATRIX_MULTIPLY" for name in layer.types}


@needs_rtx
@no_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_is_packed_and_not_run(tmp_path: Path, precision: str) -> None:
    program = modulated()
    hoisted, _ = stepfold.apply(program, {"passes": ["hoist"]}, backend="tensorrt", options=SM89)
    options = {**SM89, "precision": precision}
    folder = Path(stepfold.lower(hoisted, "tensorrt", out=tmp_path / "bundle", options=options))
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    assert (manifest.backend.name, manifest.backend.device) == ("tensorrt", "cuda")
    assert manifest.backend.options["capability"] == "SM89"
    assert all(entry.file.endswith(".engine") for entry in manifest.stages)
    assert types(folder, "step") == {"float32" if precision == "fp32" else "float16"}
    probe = read(folder).probe()
    assert isinstance(probe, Probe)
    assert probe.tolerance == TOLERANCE["float32" if precision == "fp32" else "float16"]
    with pytest.raises(UsageError, match="backend 'tensorrt' cannot run here: running: no NVIDIA GPU"):
        stepfold.load(folder)


@needs_rtx
@no_gpu
def test_the_stand_in_rounds_as_the_engine_does(tmp_path: Path) -> None:
    program = modulated()
    inputs = {name: value.numpy() for name, value in program.example.items()}
    outputs = {}
    for precision in ("fp32", "bf16"):
        with workshop("tensorrt", {**SM89, "precision": precision}) as shop:
            assert not shop.runs
            outputs[precision] = shop.measured(program).evaluate(inputs)[0]
            assert list(shop.folder.iterdir()) == []  # measuring builds nothing
    exact = program.bind().evaluate(inputs)[0]
    assert np.array_equal(outputs["fp32"], exact)
    assert not np.array_equal(outputs["bf16"], exact)


@needs_rtx
@no_gpu
def test_a_machine_without_a_gpu_needs_a_capability() -> None:
    with pytest.raises(UsageError, match=r"cannot build here: .*name the compute capability .*SM75, .*SM121"):
        workshop("tensorrt").__enter__()


def test_engines_that_run_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    monkeypatch.setattr(Onnxruntime, "prepared", lambda self, stage: prepared.append(stage) or stage)
    with workshop("onnxruntime") as shop:
        program = modulated()
        shop.measured(program)
        assert shop.runs and prepared == [] and len(list(shop.folder.iterdir())) == 1


@needs_rtx
@no_gpu
@pytest.mark.slow
def test_the_reference_checkpoint_becomes_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "cache"))
    loop = tmp_path / "loop.yaml"
    loop.write_text((MNIST / "loop.yaml").read_text().replace("steps: 50", "steps: 8"))
    schedule = {"evaluations": 4, "samples": 4, "search_samples": 2, "moves": 0}
    job = Job(
        MNIST,
        tmp_path / "bundle",
        recipe={"passes": ["hoist", {"schedule": schedule}]},
        backend="tensorrt",
        settings=[("tensorrt", "capability", "SM89")],
        loop=loop,
    )
    document = optimize(job, silent)
    assert document["schedule"]["fitted_on"] == "reference" and document["schedule"]["evaluations"] == 4
    assert document["quality"]["psnr_db"]["mean"] > 20
    (table,) = json.loads((tmp_path / "bundle" / "schedule.json").read_text())["scales"]
    assert table["fitted_on"] == "reference"
    for name in ("once", "once_timestep", "step"):
        assert PlanDescription.read(tmp_path / "bundle" / "stages" / f"{name}.engine").capability == "SM89"


class Layered(torch.nn.Module):
    """x [B, 4, 6], t [B] -> [B, 4, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)) + t[:, None, None])


@needs_rtx
@no_gpu
@pytest.mark.parametrize(
    ("activations", "received"),
    [
        ("dynamic", r"scales of run time \(quantize.activations=dynamic\)"),
        ("static", "a scale that is chosen at run time|uint8 with zero point"),
    ],
)
def test_activations_that_do_not_fit_are_refused_by_the_pass(
    activations: str, received: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path))
    program = denoiser(Layered(), torch.randn(2, 4, 6), torch.tensor([500.0, 2.0]))
    recipe = {"passes": [{"quantize": {"activations": activations}}]}
    with pytest.raises(StepfoldError, match=received):
        stepfold.apply(program, recipe, backend="tensorrt", options=SM89)


class Wide(torch.nn.Module):
    """x [B, 4, 32], t [B] -> [B, 4, 32]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.last = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.last(x + self.down(torch.relu(self.up(x)) + t[:, None, None] / 1000)))


@needs_rtx
@no_gpu
@pytest.mark.parametrize("scheme", ["int4", "svdquant"])
def test_a_bundle_of_weights_in_blocks(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the recipes w4-gptq and w4-svdquant build it, with float activations."""
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "cache"))
    program = denoiser(Wide(), torch.randn(2, 4, 32), torch.tensor([500.0, 2.0]))
    options = {"scheme": scheme, "rounding": "gptq", "activations": "float", "hoisted": "int8"}
    options |= {"rank": 4} if scheme == "svdquant" else {}
    small, _ = stepfold.apply(program, {"passes": ["hoist", {"quantize": options}]}, backend="tensorrt", options=SM89)
    folder = Path(stepfold.lower(small, "tensorrt", out=tmp_path / "bundle", options=SM89))
    plan = PlanDescription.read(folder / "stages" / "step.engine")
    assert [name for layer in plan.layers if layer.kind == "CONSTANT" for name in layer.types].count("int4") == 3
    assert read(folder).probe() is not None


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("model", [DIT, SD3, FLUX, PIXART, QWENIMAGE, UNET], ids=str)
@pytest.mark.parametrize(("precision", "name"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_models_of_the_zoo(model: ZooModel, precision: str, name: str, tmp_path: Path) -> None:
    stage = model.program.step
    (tmp_path / "stages").mkdir()
    options = TensorrtOptions.model_validate({**SM89, "precision": precision})
    plan = PlanDescription.read(lower(stage, tmp_path / "stages", options))
    assert set(plan.input_ports()) == set(stage.inputs) and plan.output_ports() == stage.outputs
    assert types(tmp_path, "step") - {"int64", "int32"} == {name}
