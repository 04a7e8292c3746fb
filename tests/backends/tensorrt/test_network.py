"""What the network definition of a plan says: ports, kinds and types of layers, profile, capability."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tensorrt_stages import SM89, block, needs_rtx, stage_of, symmetric_int8

from stepfold.backends.tensorrt.description import Batch, PlanDescription
from stepfold.backends.tensorrt.lower import lower
from stepfold.backends.tensorrt.options import TensorrtOptions
from stepfold.backends.tensorrt.provider import RTX
from stepfold.ir.program import Stage
from stepfold.loop.errors import StepfoldError, UsageError

pytestmark = needs_rtx
PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION")


def built(stage: Stage, folder: Path, options: TensorrtOptions = SM89) -> PlanDescription:
    folder.mkdir()
    return PlanDescription.read(lower(stage, folder, options))


def types(plan: PlanDescription, *kinds: str) -> Counter:
    return Counter(name for layer in plan.layers if layer.kind in kinds for name in layer.types)


def test_a_plan_has_the_ports_of_its_stage(tmp_path: Path) -> None:
    stage = block()
    plan = built(stage, tmp_path / "plan")
    assert plan.input_ports() == stage.inputs
    assert plan.output_ports() == stage.outputs
    assert (plan.provider, plan.provider_version, plan.capability) == ("tensorrt_rtx", RTX.version, "SM89")
    assert plan.batch == Batch(min=1, opt=8, max=64)


def test_float32_stays_float32(tmp_path: Path) -> None:
    plan = built(block(), tmp_path / "plan")
    assert set(types(plan, *PRODUCTS, "NORMALIZATION", "SOFTMAX")) == {"float32"}
    assert types(plan, *PRODUCTS)["float32"] == 6  # four linear layers and the two products of attention


@pytest.mark.parametrize(
    ("precision", "half"), [("fp16", "float16"), pytest.param("bf16", "bfloat16", marks=pytest.mark.slow)]
)
def test_half_precision_products_and_exact_norms(tmp_path: Path, precision: str, half: str) -> None:
    plan = built(block(), tmp_path / "plan", TensorrtOptions(capability="SM89", precision=precision))  # type: ignore[arg-type]
    assert types(plan, *PRODUCTS) == {half: 6}
    assert types(plan, "SOFTMAX") == {half: 1}
    assert set(types(plan, "NORMALIZATION")) == {"float32"}
    assert set(types(plan, "UNARY")) == {"float32"}  # the sine of the timestep
    assert [port.dtype for port in (*plan.inputs, *plan.outputs)] == ["float32"] * 4


@pytest.mark.parametrize(("precision", "scaled"), [("fp32", "float32"), ("fp16", "float16")])
def test_int8_layers_are_quantized(tmp_path: Path, precision: str, scaled: str) -> None:
    options = TensorrtOptions(capability="SM89", precision=precision)  # type: ignore[arg-type]
    plan = built(symmetric_int8(block()), tmp_path / "plan", options)
    assert types(plan, "QUANTIZE") == {"int8": 4}
    assert types(plan, "DEQUANTIZE") == {scaled: 8}  # activations and weights of four linear layers
    assert types(plan, "CONSTANT")["int8"] == 4  # the weights are stored in 8 bits


class RootMeanSquare(torch.nn.Module):
    """x [B, 4, 8] -> [B, 4, 8], its norm written out in float32 as diffusers does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.weight = torch.nn.Parameter(torch.full((8,), 2.0))
        self.gain = torch.nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight * self.gain


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_norm_that_is_written_out_stays_in_float32(tmp_path: Path, precision: str) -> None:
    """The exporter makes one operator of it, with an input in half precision and a scale in float32."""
    options = TensorrtOptions(capability="SM89", precision=precision)  # type: ignore[arg-type]
    plan = built(stage_of(RootMeanSquare(), torch.randn(2, 4, 8)), tmp_path / "plan", options)
    assert set(types(plan, "NORMALIZATION", "ELEMENTWISE")) >= {"float32"}
    assert set(types(plan, "NORMALIZATION")) <= {"float32"}


def test_options_reach_the_plan(tmp_path: Path) -> None:
    options = TensorrtOptions(capability="SM120", min_batch=2, opt_batch=4, max_batch=6, workspace_mib=256)
    plan = built(block(), tmp_path / "plan", options)
    assert (plan.capability, plan.batch) == ("SM120", Batch(min=2, opt=4, max=6))


def test_the_build_log_lies_beside_the_plan(tmp_path: Path) -> None:
    path = lower(block(), tmp_path, SM89)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step.engine", "step.engine.json", "step.engine.log"]
    log = path.with_name("step.engine.log").read_text()
    assert "[INFO] " in log and "[VERBOSE] " not in log


@pytest.mark.slow
def test_the_graph_of_a_plan_is_kept_for_polygraphy(tmp_path: Path) -> None:
    """The half of the documented comparison that needs no GPU: inputs and outputs of ONNX Runtime, as JSON."""
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'stepfold[tensorrt]'")
    lower(block(), tmp_path, TensorrtOptions(capability="SM89", keep_graph=True))
    files = [file.name for file in tmp_path.iterdir()]
    assert sorted(files) == ["step.engine", "step.engine.json", "step.engine.log", "step.onnx"]
    words = "run step.onnx --onnxrt --input-shapes x:[2,8,32] shift:[2,32] t:[2] --val-range t:[0,1000]"
    words += " --save-inputs inputs.json --save-outputs wanted.json"
    program = "import sys; from polygraphy.tools._main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "inputs.json").stat().st_size and (tmp_path / "wanted.json").stat().st_size


def test_a_timing_cache_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "timings"
    cache.write_bytes(b"damaged" * 20)
    (tmp_path / "plan").mkdir()
    lower(block(), tmp_path / "plan", TensorrtOptions(capability="SM89", timing_cache=cache))
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("stepfold")]
    assert warning == f"{cache}: ignored: tensorrt_rtx measures nothing while it builds and keeps no timings."
    assert cache.read_bytes() == b"damaged" * 20


def test_without_a_gpu_the_capability_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfold.backends.tensorrt.build.gpus", lambda: ([], "no GPU was found"))
    with pytest.raises(UsageError, match=r"no GPU was found; name the compute capability to build for, such as SM89"):
        lower(block(), tmp_path, TensorrtOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_weight_out_of_range(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.data[0, 0] = 1e6
    stage = stage_of(layer, torch.randn(2, 2))
    with pytest.raises(
        StepfoldError, match=r"weight weight: expected values up to 65504, .*received 1e\+06. Choose bf16"
    ):
        lower(stage, tmp_path, TensorrtOptions(capability="SM89", precision="fp16"))
