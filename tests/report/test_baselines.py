"""Baselines: their tables, their model files and that they compute what the checkpoint computes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest

from stepfold.bundle.reader import read
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.loop.metrics import drift, psnr
from stepfold.loop.pipeline_call import PipelineCall
from stepfold.loop.spec import LoopSpec
from stepfold.report import work
from stepfold.report.baselines.build import build, chain, describe, work_of
from stepfold.report.baselines.names import parse
from stepfold.report.baselines.opening import open_baseline
from stepfold.report.baselines.prepare import prepare, read_table
from stepfold.report.work import Work

Array = np.ndarray
COUNT = 4


class Bench:
    """Prepares, builds and opens baselines of the tiny checkpoint in this process."""

    def __init__(self, checkpoint: Path, bundle: Path, folder: Path):
        self.checkpoint, self.folder = checkpoint, folder
        self.work = work.of_bundles([read(bundle)])
        self.prepared = prepare(checkpoint, ["onnxruntime@4", "onnxruntime@4:ab2", "eager:ddim"], None, folder)
        self.request = self.work.arrays(COUNT, 3)

    def build(self, artifact: str, **changes: Any) -> int:
        message = {
            "artifact": artifact,
            "checkpoint": str(self.checkpoint),
            "folder": str(self.folder),
            "threads": 1,
            "table": self.prepared["tables"]["reference"],
            "example": None,
            **describe(self.work),
            **changes,
        }
        return build(message, lambda done, total: None)

    def sample(self, name: str, table: str = "reference") -> Array:
        baseline = parse(name)
        for artifact in chain(baseline.artifact):
            self.build(artifact)
        row = {
            "engine": baseline.engine,
            "checkpoint": str(self.checkpoint),
            "artifact": str(self.folder / baseline.artifact),
            "table": self.prepared["tables"][table],
            **describe(self.work),
        }
        return open_baseline(row, 1).sample(self.request)


@pytest.fixture(scope="module")
def baselines(tiny_checkpoint: Path, compiled_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tiny_checkpoint, compiled_bundle, tmp_path_factory.mktemp("baselines"))


@pytest.fixture(scope="module")
def reference(baselines: Bench) -> Array:
    """The full fp32 loop, by PyTorch."""
    return baselines.sample("eager")


def by_hand(checkpoint: Path, request: dict[str, Array]) -> Array:
    """Guided Euler over eight steps, written out with the diffusers model."""
    import torch
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(checkpoint).eval()
    latents, labels = torch.from_numpy(request[work.NOISE]), torch.from_numpy(request["condition/class_labels"])
    for sigma in torch.linspace(1, 1 / 8, 8):
        time = torch.full((len(latents),), 1000.0 * float(sigma))
        with torch.no_grad():
            conditional = model(latents, time, labels).sample
            unconditional = model(latents, time, torch.full_like(labels, 4)).sample
        latents = latents - (unconditional + 2.0 * (conditional - unconditional)) / 8
    return latents.numpy()


def test_reference_is_the_loop_written_out(baselines: Bench, reference: Array) -> None:
    assert reference.shape == (COUNT, 1, 8, 8)
    assert drift(reference, by_hand(baselines.checkpoint, baselines.request)) < 1e-5


def test_prepare_folds_each_sampler(baselines: Bench) -> None:
    tables = {name: read_table(file) for name, file in baselines.prepared["tables"].items()}
    assert {name: table.evaluations for name, table in tables.items()} == {
        "reference": 8,
        "onnxruntime@4": 4,
        "onnxruntime@4:ab2": 4,
    }
    assert tables["onnxruntime@4"].timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]
    # Guided outputs v = 2 c - u, step -1/4: Euler reads the newest, AB2 (3/2, -1/2) of the two newest.
    assert tables["onnxruntime@4"].conditional[2].tolist() == pytest.approx([0, 0, -0.5, 0])
    assert tables["onnxruntime@4:ab2"].conditional[2].tolist() == pytest.approx([0, 0.25, -0.75, 0])
    assert tables["onnxruntime@4:ab2"].unconditional[2].tolist() == pytest.approx([0, -0.125, 0.375, 0])


def test_a_solver_of_another_family_is_a_reason_and_no_error(baselines: Bench) -> None:
    assert "DDIMScheduler is of another family" in baselines.prepared["reasons"]["eager:ddim"]


def test_prepare_identifies_the_checkpoint(baselines: Bench, compiled_bundle: Path) -> None:
    manifest = read(compiled_bundle).manifest
    assert baselines.prepared["class"] == manifest.model.class_name
    assert baselines.prepared["weights_sha256"] == manifest.model.weights_sha256


def test_a_solver_that_does_not_exist_is_wrong_use(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="diffusers has no class 'HeunnDiscreteScheduler'; did you mean"):
        prepare(tiny_checkpoint, ["eager:HeunnDiscreteScheduler"], None, tmp_path)


def test_onnxruntime_computes_what_eager_computes(baselines: Bench, reference: Array) -> None:
    assert psnr(baselines.sample("onnxruntime"), reference).min() > 100


def test_fewer_steps_cost_quality_and_ab2_wins_some_back(baselines: Bench, reference: Array) -> None:
    euler = psnr(baselines.sample("onnxruntime", "onnxruntime@4"), reference).mean()
    ab2 = psnr(baselines.sample("onnxruntime", "onnxruntime@4:ab2"), reference).mean()
    assert euler < ab2 < 100


def test_int8_is_quantized_dynamically_with_signed_weights_per_channel(baselines: Bench, reference: Array) -> None:
    import onnx

    samples = baselines.sample("onnxruntime-int8")
    assert 20 < psnr(samples, reference).mean() < 90
    graph = onnx.load(str(baselines.folder / "onnxruntime-int8" / "model.onnx")).graph
    kinds = [node.op_type for node in graph.node]
    assert "MatMulInteger" in kinds and "DynamicQuantizeLinear" in kinds
    assert "Conv" in kinds and "ConvInteger" not in kinds
    weights = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims]
    assert any(len(tensor.dims) == 2 for tensor in weights)
    scales = [tensor for tensor in graph.initializer if tensor.name.endswith("_scale") and len(tensor.dims) == 1]
    assert any(tensor.dims[0] > 1 for tensor in scales)


def test_reduced_weights_have_seven_bits(baselines: Bench, reference: Array) -> None:
    import onnx

    assert 20 < psnr(baselines.sample("onnxruntime-int8-reduced"), reference).mean() < 90
    graph = onnx.load(str(baselines.folder / "onnxruntime-int8-reduced" / "model.onnx")).graph
    weights = [
        onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.dims
    ]
    assert weights and max(int(np.abs(weight.astype(int)).max()) for weight in weights) <= 64


def test_an_exported_model_serves_any_batch(baselines: Bench, reference: Array) -> None:
    whole = dict(baselines.request)
    baselines.request = {name: value[:1] for name, value in whole.items()}
    try:
        assert drift(baselines.sample("onnxruntime"), reference[:1]) < 1e-4
    finally:
        baselines.request = whole


def test_compile_computes_what_eager_computes(
    baselines: Bench, reference: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    compiled: list[object] = []

    def stand_in(module: Callable[..., Any]) -> Callable[..., Any]:  # a real compilation takes a minute
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", stand_in)
    assert np.array_equal(baselines.sample("compile"), reference)
    assert len(compiled) == 1


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
def test_openvino_computes_what_eager_computes(baselines: Bench, reference: Array) -> None:
    exact = baselines.sample("openvino")
    assert psnr(exact, reference).min() > 80
    assert (baselines.folder / "openvino" / "model.xml").is_file()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs openvino and nncf")
def test_openvino_int8_is_quantized(baselines: Bench, reference: Array) -> None:
    assert 20 < psnr(baselines.sample("openvino-int8"), reference).mean() < 90
    weights = [(baselines.folder / name / "model.bin").stat().st_size for name in ("openvino-int8", "openvino")]
    assert weights[0] < 0.6 * weights[1]


def test_calibration_states_are_those_of_the_trajectory(baselines: Bench) -> None:
    pytest.importorskip("openvino")
    from stepfold.report.baselines.openvino_engines import CALIBRATION_SAMPLES, CALIBRATION_STATES, loop_states

    table = read_table(baselines.prepared["tables"]["reference"])
    states = loop_states(lambda inputs: [inputs["hidden_states"]], baselines.work, table, lambda done, total: None)
    assert len(states) == CALIBRATION_STATES
    assert states[0]["hidden_states"].shape == (2 * CALIBRATION_SAMPLES, 1, 8, 8)
    assert {float(state["timestep"][0]) for state in states} == set(table.timesteps.tolist())
    assert {int(label) for state in states for label in state["class_labels"]} == {0, 1, 2, 3, 4}
    first, second = (state["hidden_states"] for state in states[:2])
    assert not np.array_equal(first, second)


def test_chain_ends_with_what_was_asked_for() -> None:
    assert chain("openvino-int8") == ["onnxruntime", "openvino", "openvino-int8"]
    assert chain("onnxruntime-int8") == ["onnxruntime", "onnxruntime-int8"]
    assert chain("eager") == []


def test_an_artifact_is_built_once(baselines: Bench) -> None:
    size = baselines.build("onnxruntime")
    model = baselines.folder / "onnxruntime" / "model.onnx"
    before = model.stat().st_mtime_ns
    assert baselines.build("onnxruntime", checkpoint="/nothing") == size == model.stat().st_size
    assert model.stat().st_mtime_ns == before


def test_a_build_that_fails_leaves_nothing(baselines: Bench, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()  # an export without its model
    with pytest.raises(FileNotFoundError):
        baselines.build("onnxruntime-int8", folder=str(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["onnxruntime"]


def test_a_damaged_model_is_refused_in_one_line(baselines: Bench, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    row = {"engine": "onnxruntime", "artifact": str(tmp_path), "table": None, **describe(baselines.work)}
    with pytest.raises(StepfoldError, match="ONNX Runtime cannot load the exported model") as error:
        open_baseline(row, 1)
    assert "\n" not in str(error.value)


def test_a_component_has_no_steps_and_no_loop_states(tmp_path: Path) -> None:
    from stepfold.report.baselines.openvino_engines import quantize
    from stepfold.report.baselines.prepare import table_of

    assert table_of(parse("eager"), None) is None
    with pytest.raises(UsageError, match="a component without a loop has no steps and no solver"):
        table_of(parse("eager@5"), None)
    with pytest.raises(StepfoldError, match="calibrated on states of a loop; a component has none"):
        quantize(tmp_path, tmp_path, Work(None, (), {}), None, 1, lambda done, total: None)


def test_a_pipeline_is_called_as_its_bundles_were(compiled_bundle: Path, tmp_path: Path) -> None:
    """Steps, guidance and size of the call; bundles that were made with different ones leave the pipeline its own."""
    from stepfold.report.baselines.torch_engines import module_of

    folder = pipelines.stable_diffusion(tmp_path / "pipeline")
    call = PipelineCall(steps=3, guidance=1.0, height=8, width=24)
    loop = prepare(folder, [], None, tmp_path, call.model_dump(mode="json"))["loop"]
    assert (loop["sampler"]["steps"], loop["guidance"], loop["latent"]["shape"]) == (3, None, [4, 4, 12])
    told = Work(LoopSpec.model_validate(loop), (), {}, call=call)
    again = work_of({**describe(told), "example": None})
    assert again.call == call
    assert module_of(folder, again)[1]["sample"].shape == (2, 4, 4, 12)
    plain = read(compiled_bundle)
    called = replace(plain, manifest=plain.manifest.model_copy(update={"call": call}))
    assert work.shared_call([called, called]) == call and work.of_bundles([called]).call == call
    assert work.shared_call([called, plain]) is None


def test_a_checkpoint_without_loop_yaml_takes_the_loop_of_the_bundle(
    tiny_checkpoint: Path, compiled_bundle: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_checkpoint.iterdir():
        if file.name != "loop.yaml":
            (bare / file.name).symlink_to(file)
    loop = read(compiled_bundle).manifest.loop
    assert loop is not None
    answer = prepare(bare, [], loop.model_dump(mode="json"), tmp_path)
    assert answer["loop"] == loop.model_dump(mode="json")
    assert read_table(answer["tables"]["reference"]).evaluations == 8
