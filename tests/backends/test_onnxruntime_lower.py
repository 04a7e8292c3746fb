"""Every stepfold:: operator in ONNX Runtime equals its reference; what the emitted files are like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import component, modulated, modulated_example, operators
from stages import MASKS, STAGES, M, T, arrays, masked_attention

from stepfold.backends.onnx import emit as emission
from stepfold.backends.onnx.emit import lowered, where
from stepfold.backends.onnxruntime.lower import LOWERINGS, lower
from stepfold.backends.onnxruntime.session import open_session
from stepfold.ir.operators import RECORDS
from stepfold.ir.program import reference
from stepfold.loop.errors import StepfoldError

SDPA = torch.ops.aten.scaled_dot_product_attention.default
GROUP_NORM = torch.ops.aten.group_norm.default
FLOAT = 1e-4  # the exponential of the engine's softmax is its own
SETTINGS = settings(max_examples=20)
Run = Callable[[str, dict[str, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Outputs of a stage in ONNX Runtime beside those of its reference."""
    sessions = {}

    def run(name: str, inputs: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        stage = STAGES[name][1]
        if name not in sessions:
            file = lower(stage, tmp_path_factory.mktemp("stage"))
            sessions[name] = open_session(file, stage.inputs, stage.outputs, threads=1)
        return list(zip(sessions[name](inputs), reference(stage)(inputs), strict=True))

    return run


def assert_same(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for received, wanted in pairs:
        assert received.dtype == wanted.dtype and received.shape == wanted.shape
        if wanted.dtype == np.uint8:
            np.testing.assert_array_equal(received, wanted)
        else:
            np.testing.assert_allclose(received, wanted, rtol=FLOAT, atol=FLOAT * max(1, np.abs(wanted).max()))


def test_every_operator_has_a_lowering_and_is_tested_here() -> None:
    """But for what OpenVINO makes of activations that are rounded at run time."""
    tried = {operator for operator, _ in STAGES.values()}
    assert tried == {*RECORDS} - {torch.ops.stepfold.group_qlinear.default}
    assert all(operator in LOWERINGS or RECORDS[operator].portable for operator in tried)


@pytest.mark.parametrize("name", STAGES)
def test_equal_to_the_reference(both: Run, name: str) -> None:
    @SETTINGS
    @given(st.data(), st.integers(1, 4))
    def check(data: st.DataObject, batch: int) -> None:
        assert_same(both(name, {item.name: arrays(item, batch, data) for item in STAGES[name][1].inputs}))

    check()


@pytest.mark.parametrize("name", ["quantize_dynamic", "quantize_dynamic of rows"])
@pytest.mark.parametrize(
    "value", [0.0, -3.0, 3.0, 1e-38, -1e-38, 1e30], ids=["zero", "negative", "positive", "tiny", "tiny-", "huge"]
)
def test_dynamic_quantization_of_constant_tensors(both: Run, name: str, value: float) -> None:
    shape = [2 if size is None else size for size in STAGES[name][1].inputs[0].shape]
    assert_same(both(name, {"x": np.full(shape, value, np.float32)}))


def test_dynamic_quantization_of_one_sided_tensors(both: Run) -> None:
    ramp = np.linspace(0.5, 2, 2 * T * M, dtype=np.float32).reshape(2, T, M)
    for x in (ramp, -ramp):
        assert_same(both("quantize_dynamic", {"x": x}))


def test_static_quantization_saturates(both: Run) -> None:
    x = np.array([-1e6, 1e6, 0, 46.5, 46.499996, -30], np.float32) * np.ones((2, T, 1), np.float32)
    assert_same(both("quantize_static", {"x": x}))


def test_integer_product_does_not_overflow(both: Run) -> None:
    """The largest values of both sides: |product| = 6 * 155 * 127."""
    q = np.full((2, T, M), 255, np.uint8)
    assert_same(both("qlinear", {"q": q}))


def test_attention_with_a_mask(tmp_path: Path) -> None:
    stage, values = masked_attention()
    assert operators(stage).count("scaled_dot_product_attention.default") == len(stage.outputs) == 2 * len(MASKS)
    session = open_session(lower(stage, tmp_path), stage.inputs, stage.outputs, threads=1)
    assert_same(list(zip(session(values), reference(stage)(values), strict=True)))


PLAIN = torch.nn.functional.group_norm
GROUP_NORMS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "images": (lambda x: PLAIN(x, 3, torch.linspace(-1, 2, 6), torch.linspace(1, 2, 6), 1e-3), (6, 4, 5)),
    "tokens": (lambda x: PLAIN(x, 2, torch.linspace(-1, 2, 6), torch.linspace(1, 2, 6)), (6, 7)),
    "rows": (lambda x: PLAIN(x, 2, torch.linspace(-1, 2, 6), torch.linspace(1, 2, 6)), (6,)),
    "video": (lambda x: PLAIN(x, 1, torch.linspace(-1, 2, 4), torch.linspace(1, 2, 4)), (4, 2, 3, 5)),
    "one channel in a group": (lambda x: PLAIN(x, 6, torch.linspace(-1, 2, 6), torch.linspace(1, 2, 6)), (6, 4, 5)),
    "without weights": (lambda x: PLAIN(x, 3), (6, 4, 5)),
    "with a weight alone": (lambda x: PLAIN(x, 3, torch.linspace(-1, 2, 6)), (6, 4, 5)),
}


@pytest.mark.parametrize("name", GROUP_NORMS)
def test_group_norms_have_kernels(name: str, tmp_path: Path) -> None:
    """The engine has none for `GroupNormalization` and would put twenty operators in its place."""
    function, shape = GROUP_NORMS[name]
    generator = torch.Generator().manual_seed(0)
    stage = component(lambda x: function(x * 2 + 1), torch.randn(2, *shape, generator=generator)).step
    file = lower(stage, tmp_path)
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert kinds.count("InstanceNormalization") == kinds.count("BatchNormalization") == 1
    assert set(kinds) <= {"Mul", "Add", "Reshape", "InstanceNormalization", "BatchNormalization"}
    session = open_session(file, stage.inputs, stage.outputs, threads=1)
    for batch in (1, 3):
        values = {"x": torch.randn(batch, *shape, generator=generator).numpy()}
        assert_same(list(zip(session(values), reference(stage)(values), strict=True)))


def test_a_norm_of_root_mean_squares_is_one_operator(tmp_path: Path) -> None:
    """The exporter recognizes what diffusers' RMSNorm is traced as."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * torch.linspace(1, 2, 6)

    stage = component(lambda x: norm(x + 1), torch.randn(2, 3, 6)).step
    assert "pow.Tensor_Scalar" in operators(stage)
    kinds = [node.op_type for node in onnx.load(lower(stage, tmp_path)).graph.node]
    assert kinds == ["Add", "RMSNormalization"]


# -- the emitted files


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the step of `Modulated`."""
    return lower(modulated().step, tmp_path_factory.mktemp("modulated"))


def test_ports_keep_their_names_and_a_dynamic_batch(written: Path) -> None:
    model = onnx.load(written)
    names = {item.name: item.type.tensor_type.shape.dim for item in [*model.graph.input, *model.graph.output]}
    assert list(names) == ["x", "t", "c", "y"]
    assert all(shape[0].dim_param and not shape[0].dim_value for shape in names.values())
    assert [dim.dim_value for dim in names["x"][1:]] == [3, 5]
    assert {(item.domain, item.version) for item in model.opset_import} >= {("", emission.OPSET)}


@pytest.mark.parametrize("batch", [1, 2, 20])
def test_one_file_serves_any_batch(written: Path, batch: int) -> None:
    stage = modulated().step
    session = open_session(written, stage.inputs, stage.outputs, threads=1)
    values = {item.name: value.numpy() for item, value in zip(stage.inputs, modulated_example(batch), strict=True)}
    np.testing.assert_allclose(session(values)[0], reference(stage)(values)[0], rtol=1e-5, atol=1e-5)


def test_no_inferred_shapes_are_left(written: Path) -> None:
    """Stale ones break the stock quantizer of ONNX Runtime."""
    model = onnx.load(written)
    computed = {name for node in model.graph.node for name in node.output}
    assert len(computed) > 3
    assert [item.name for item in model.graph.value_info if item.name in computed] == []


def test_weights_are_in_the_file_and_the_stage_is_as_it_was(tmp_path: Path) -> None:
    stage = STAGES["qlinear"][1]
    before = str(stage.graph.graph)
    file = lower(stage, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"] and file == tmp_path / "one.onnx"
    assert str(stage.graph.graph) == before and "stepfold" in before


def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emission, "EXTERNAL_DATA_BYTES", 64)
    stage = component(torch.nn.Linear(16, 16), torch.randn(2, 16)).step
    file = lower(stage, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forward.onnx", "forward.onnx.data"]
    assert (tmp_path / "forward.onnx.data").stat().st_size >= 16 * 16 * 4
    x = np.ones((3, 16), np.float32)
    session = open_session(file, stage.inputs, stage.outputs, threads=1)
    np.testing.assert_allclose(session({"input": x})[0], reference(stage)({"input": x})[0], rtol=1e-5, atol=1e-6)


def test_the_same_stage_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    assert lower(modulated().step, tmp_path).read_bytes() == written.read_bytes()


# -- what has no form


def test_an_operator_without_a_lowering_is_named() -> None:
    with pytest.raises(StepfoldError, match=r"stage one: node \w+ \(top level; no source line\): stepfold.qlinear"):
        lowered(STAGES["qlinear"][1], {})


def test_an_operator_without_a_lowering_has_its_portable_form() -> None:
    graph = lowered(STAGES["rotary"][1], {})
    assert not [node for node in graph.graph.nodes if "stepfold" in str(node.target)]


def test_lowered_replaces_every_operator() -> None:
    graph = lowered(STAGES["qlinear"][1], LOWERINGS)
    assert not [node for node in graph.graph.nodes if "stepfold" in str(node.target)]


def test_an_operator_that_onnx_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i1e(x)  # the line of the report

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x) + 1

    stage = component(Model(), torch.randn(2, 3)).step
    with pytest.raises(StepfoldError) as caught:
        lower(stage, tmp_path)
    text = str(caught.value)
    assert text.startswith(
        "stage forward: node bessel_i1e (block; return torch.special.i1e(x)  # the line of the report)"
    )
    assert "has no ONNX form: No ONNX function found for" in text and len(text.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_the_exporter_fixes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = component(lambda x: x.relu(), torch.randn(2, 3)).step
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, dynamic_shapes, **more: export(*a, **more))
    with pytest.raises(StepfoldError, match=r"stage forward: expected a dynamic batch; .* 'x' with batch 2 only"):
        lower(stage, tmp_path)


def test_where_names_module_and_line() -> None:
    program = modulated()
    node = next(node for node in program.step.graph.graph.nodes if node.target is torch.ops.aten.sin.default)
    assert where(node).startswith("node sin (top level; ") and "torch.sin" in where(node)
    linear = next(n for n in program.step.graph.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert "(time; " in where(linear)
