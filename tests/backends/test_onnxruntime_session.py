"""Sessions of ONNX Runtime: outputs in port order, any batch, external data, and clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from stepfold.backends.onnxruntime import session
from stepfold.loop.errors import BundleError, StepfoldError, UsageError
from stepfold.loop.ports import Port

INPUTS = (Port("x", (None, 2), "float32"), Port("nested.index", (None,), "int64"))
OUTPUTS = (Port("later", (None, 2), "float32"), Port("first", (None, 2), "float32"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """first = 2 x, later = x + index; ONNX declares them the other way round than the ports do."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["first"]),
        helper.make_node("Cast", ["nested.index"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Unsqueeze", ["cast", "one"], ["column"]),
        helper.make_node("Add", ["x", "column"], ["later"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "stage",
        [value("x", TensorProto.FLOAT, ["B", 2]), value("nested.index", TensorProto.INT64, ["B"])],
        [value("first", TensorProto.FLOAT, ["B", 2]), value("later", TensorProto.FLOAT, ["B", 2])],
    )
    path = tmp_path_factory.mktemp("models") / "stage.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_come_in_port_order(file: Path, batch: int) -> None:
    call = session.open_session(file, INPUTS, OUTPUTS, threads=1)
    x = np.arange(2 * batch, dtype=np.float32).reshape(batch, 2)
    later, first = call({"nested.index": np.full(batch, 5), "x": x, "unused": x})
    np.testing.assert_array_equal(first, 2 * x)
    np.testing.assert_array_equal(later, x + 5)


def test_inputs_need_not_be_contiguous(file: Path) -> None:
    call = session.open_session(file, INPUTS, OUTPUTS, threads=1)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)[:, ::2]
    np.testing.assert_array_equal(call({"x": x, "nested.index": np.zeros(2, np.int64)})[1], 2 * x)


def test_options_of_a_session(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: (seen.append((a[1], k)), real(*a, **k))[1])
    session.open_session(file, INPUTS, OUTPUTS, threads=2)
    options, keywords = seen[0]
    assert (options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level) == (2, 1, 3)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert keywords == {"providers": ["CPUExecutionProvider"], "disabled_optimizers": ["SkipLayerNormFusion"]}


def test_a_norm_of_a_sum_stays_two_operators(tmp_path: Path) -> None:
    """ONNX Runtime would put them into one whose kernel is slower; if it renames that optimizer, this fails."""
    value = helper.make_tensor_value_info
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [4], [1.0] * 4) for name in ("scale", "bias")]
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "y"], ["sum"]),
            helper.make_node("LayerNormalization", ["sum", "scale", "bias"], ["normed"]),
        ],
        "stage",
        [value(name, TensorProto.FLOAT, ["B", 3, 4]) for name in ("x", "y")],
        [value("normed", TensorProto.FLOAT, ["B", 3, 4])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def operators(**keywords: Any) -> set[str]:
        options = session.session_options(1)
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, **keywords)
        return {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}

    assert operators(**session.on(["CPUExecutionProvider"])) == {"Add", "LayerNormalization"}
    assert operators(providers=["CPUExecutionProvider"]) == {"SkipLayerNormalization"}


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (INPUTS[:1], OUTPUTS, "expected the inputs x (float32, rank 2); received nested.index (int64, rank 1), x"),
        ((INPUTS[0], Port("nested.index", (None,), "int32")), OUTPUTS, "expected the inputs nested.index (int32"),
        ((INPUTS[0], Port("nested.index", (), "int64")), OUTPUTS, "expected the inputs nested.index (int64, rank 0)"),
        (INPUTS, OUTPUTS[:1], "expected the outputs later (float32, rank 2); received first"),
    ],
)
def test_other_ports_are_refused(file: Path, inputs: tuple[Port, ...], outputs: tuple[Port, ...], message: str) -> None:
    with pytest.raises(BundleError) as error:
        session.open_session(file, inputs, outputs)
    assert message in str(error.value) and "stage.onnx" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"x\.onnx: ONNX Runtime [0-9.]+ cannot load it: "):
        session.open_session(tmp_path / "x.onnx", INPUTS, OUTPUTS)


def test_a_run_that_fails_says_what_it_was_given(file: Path) -> None:
    call = session.open_session(file, INPUTS, OUTPUTS, threads=1)
    with pytest.raises(StepfoldError, match=r"stage\.onnx: ONNX Runtime failed on x \[1, 3\] float32, nested\.index"):
        call({"x": np.zeros((1, 3), np.float32), "nested.index": np.zeros(1, np.int64)})


def test_an_unknown_device(file: Path) -> None:
    with pytest.raises(UsageError, match="device: expected one of cpu, cuda; received 'tpu'"):
        session.open_session(file, INPUTS, OUTPUTS, device="tpu")


def test_a_package_without_cuda_says_how_to_get_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match=r"has no CUDAExecutionProvider.*pip install onnxruntime-gpu"):
        session.open_session(file, INPUTS, OUTPUTS, device="cuda")


def test_cuda_that_does_not_start_is_no_silent_cpu(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU package without a GPU falls back to the CPU with a warning; asking for CUDA must not."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, **_: real(path, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(UsageError, match=r"CUDAExecutionProvider: expected to start; .* or use the device 'cpu'"):
        session.open_session(file, INPUTS, OUTPUTS, device="cuda")


def test_external_data_may_not_lie_elsewhere(read_only_bundle: Path, tmp_path: Path) -> None:
    """The engine itself refuses weights from outside the model's folder."""
    model = onnx.load(read_only_bundle / "stages" / "step.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../secret"
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "step.onnx").write_bytes(model.SerializeToString())
    ports = Port("hidden_states", (None, 1, 2, 2), "float32"), Port("shift", (None, 1), "float32")
    with pytest.raises(BundleError, match="cannot load it"):
        session.open_session(tmp_path / "stages" / "step.onnx", ports, (Port("sample", ports[0].shape, "float32"),))
