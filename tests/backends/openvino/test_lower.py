"""Every stepfold:: operator in OpenVINO equals its reference; what the written files are like."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blocks import block, needs_vnni, quantized, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import component, modulated, modulated_example
from stages import BIAS, STAGES, M, T, arrays, masked_attention, static_pair
from zoo import BY_NAME, EACH, ZooModel

from stepfold.backends.onnx.token_groups import GROUP_QLINEAR
from stepfold.backends.openvino.lower import LOWERINGS, lower, prepare
from stepfold.backends.openvino.options import OpenvinoOptions
from stepfold.backends.openvino.session import open_session
from stepfold.ir.operators import RECORDS
from stepfold.ir.program import Program, Stage, reference
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.loop.metrics import drift
from stepfold.loop.ports import StageCallable

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'stepfold[openvino]'")

FLOAT = 1e-4  # kernels choose the order of their sums
LEVEL = 1e-3  # relative L2 error of one evaluation whose integers differ in a few roundings at the border of two levels
INTEGER = 5e-3  # the same after many layers, each of which passes on what the ones before it rounded otherwise
SETTINGS = settings(max_examples=20)
OPTIONS = OpenvinoOptions()
NAMES = (
    "quantize_static",
    "attention",
    "blocked_linear",
    "rotary",
    "rotary, heads first",
)
ALONE = {name: STAGES[name][1] for name in NAMES}
PAIRS = {
    "qlinear": static_pair((None, T, M), BIAS),
    "qlinear without bias": static_pair((None, T, M), None),
    "qlinear of rows": static_pair((None, M), BIAS),
}
TRIED = ALONE | PAIRS
Session = Callable[..., StageCallable]
Integers = Callable[[str], tuple[Stage, StageCallable]]
Run = Callable[[str, dict[str, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Outputs of a stage in OpenVINO beside those of its reference."""
    sessions: dict[str, Any] = {}

    def run(name: str, inputs: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        stage = TRIED[name]
        if name not in sessions:
            file = lower(stage, tmp_path_factory.mktemp("stage"), options=OPTIONS)
            sessions[name] = open_session(file, stage.inputs, stage.outputs, threads=1, options=OPTIONS)
        return list(zip(sessions[name](inputs), reference(stage)(inputs), strict=True))

    return run


def assert_same(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for received, wanted in pairs:
        assert received.dtype == wanted.dtype and received.shape == wanted.shape
        if wanted.dtype == np.uint8:  # a value between two levels may go either way
            assert np.abs(received.astype(int) - wanted).max(initial=0) <= 1
            assert (received != wanted).mean() <= 0.2
        else:
            np.testing.assert_allclose(received, wanted, rtol=FLOAT, atol=FLOAT * max(1, np.abs(wanted).max()))


def test_every_operator_is_lowered_or_refused(tmp_path: Path) -> None:
    lowered = {
        torch.ops.stepfold.quantize_static.default,
        torch.ops.stepfold.qlinear.default,
        torch.ops.stepfold.blocked_linear.default,
        torch.ops.stepfold.attention.default,
    }
    assert set(LOWERINGS) == {*lowered, GROUP_QLINEAR}
    without = {operator for operator, record in RECORDS.items() if record.portable is None} - {*LOWERINGS}
    assert without == {torch.ops.stepfold.quantize_dynamic.default}
    with pytest.raises(StepfoldError, match=r"stepfold\.quantize_dynamic\.default has no lowering for this engine"):
        lower(STAGES["quantize_dynamic"][1], tmp_path, options=OPTIONS)


@pytest.mark.parametrize("name", TRIED)
def test_equal_to_the_reference(both: Run, name: str) -> None:
    @SETTINGS
    @given(st.data(), st.integers(1, 4))
    def check(data: st.DataObject, batch: int) -> None:
        assert_same(both(name, {item.name: arrays(item, batch, data) for item in TRIED[name].inputs}))

    check()


def test_static_quantization_saturates(both: Run) -> None:
    x = np.array([-1e6, 1e6, 0, 46.5, 46.499996, -30], np.float32) * np.ones((2, T, 1), np.float32)
    assert_same(both("quantize_static", {"x": x}))


def test_integer_product_does_not_overflow(both: Run) -> None:
    """The largest values of both sides: |product| = 6 * 155 * 127."""
    assert_same(both("qlinear", {"x": np.full((2, T, M), 1e6, np.float32)}))


def test_an_integer_layer_whose_activations_are_stored_in_8_bits_runs_in_float(tmp_path: Path) -> None:
    with pytest.raises(StepfoldError, match=r"it is a FullyConnected of f32 and i8 "):
        lower(STAGES["qlinear"][1], tmp_path, options=OPTIONS)


def test_an_integer_layer_whose_scale_changes_with_the_timestep_runs_in_float(tmp_path: Path) -> None:
    stage = static_pair((None, T, M), BIAS, from_input=True)
    with pytest.raises(StepfoldError, match="those that change with the timestep are not for this engine"):
        lower(stage, tmp_path, options=OPTIONS)


def test_attention_with_a_mask(opened: Session) -> None:
    stage, values = masked_attention()
    assert_same(list(zip(opened(stage)(values), reference(stage)(values), strict=True)))


# -- integer layers


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Integers:
    """The block with activations of a kind in 8 bits, and as the engine runs it."""

    @cache
    def made(activations: str) -> tuple[Stage, StageCallable]:
        stage = quantized(block(), activations, tmp_path_factory.mktemp("cache"))
        file = lower(stage, tmp_path_factory.mktemp("stage"), options=OPTIONS)
        return stage, open_session(file, stage.inputs, stage.outputs, threads=1, options=OPTIONS)

    return made


@needs_vnni
def test_dynamic_layers_are_those_of_the_prepared_stage(integers: Integers) -> None:
    stage, call = integers("dynamic")
    groups, tensor = reference(prepare(stage, OPTIONS)), reference(stage)
    for batch in (1, 5):
        values = {stage.inputs[0].name: tokens(batch)}
        (received,), (exact,) = call(values), block().bind().evaluate(values)
        assert drift(received, groups(values)[0]) < LEVEL < drift(received, exact)
        finer = drift(received, exact) < drift(tensor(values)[0], exact)
        assert finer, "a scale for each token is finer than one for the batch"


@pytest.mark.parametrize("activations", ["static", "symmetric"])
def test_stored_scales_are_those_of_the_reference(integers: Integers, activations: str) -> None:
    stage, call = integers(activations)
    run = reference(stage)
    for batch in (1, 5):
        values = {stage.inputs[0].name: tokens(batch)}
        (received,) = call(values)
        assert drift(received, run(values)[0]) < LEVEL < drift(received, block().bind().evaluate(values)[0])


@needs_vnni
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_a_sample_does_not_depend_on_its_batch_mates(integers: Integers, activations: str) -> None:
    stage, call = integers(activations)
    name = stage.inputs[0].name
    mates = tokens(3)
    louder = np.concatenate([mates[:1], 50 * mates[1:]])
    np.testing.assert_array_equal(call({name: mates})[0][:1], call({name: louder})[0][:1])
    (quiet,), (loud,) = (reference(stage)({name: x}) for x in (mates, louder))
    assert np.array_equal(quiet[:1], loud[:1]) == (activations == "static"), "what the reference does"


@needs_vnni
def test_a_layer_that_would_run_in_float_is_refused(tmp_path: Path) -> None:
    """The groups have 16 features, so a layer that reads 12 keeps its activations in float."""
    program = component(torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.GELU(), torch.nn.Linear(24, 3)),
                        torch.randn(2, 4, 12))  # fmt: skip
    stage = quantized(program, "dynamic", tmp_path)
    with pytest.raises(StepfoldError) as caught:
        lower(stage, tmp_path, options=OPTIONS)
    text = str(caught.value)
    assert text.startswith("stage forward: layer 0: expected a product of 8-bit integers; OpenVINO would compute it in")
    assert "its width 12 against groups of 16" in text and "quantize.skip" in text


def test_a_narrow_layer_with_a_static_scale(opened: Session, tmp_path: Path) -> None:
    program = component(torch.nn.Sequential(torch.nn.Linear(5, 24), torch.nn.GELU(), torch.nn.Linear(24, 3)),
                        torch.randn(2, 4, 5))  # fmt: skip
    stage = quantized(program, "static", tmp_path)
    values = {stage.inputs[0].name: np.ones((2, 4, 5), np.float32)}
    assert drift(opened(stage)(values)[0], reference(stage)(values)[0]) < LEVEL


# -- precision


def bf16() -> OpenvinoOptions:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    return OpenvinoOptions(precision="bf16")


def test_float32_is_not_rounded_and_bfloat16_is(opened: Session) -> None:
    stage = block().step
    values = {stage.inputs[0].name: tokens(2)}
    (wanted,) = reference(stage)(values)
    assert drift(opened(stage)(values)[0], wanted) < 1e-5
    assert 1e-4 < drift(opened(stage, bf16())(values)[0], wanted) < 2e-2  # 8 bits of mantissa: 2**-9 = 2e-3 a value


@needs_vnni
def test_integer_layers_stay_integer_in_bfloat16(opened: Session, integers: Integers) -> None:
    """`lower` asks with the precision, so it would refuse a layer that bfloat16 takes out of the integers."""
    stage, _ = integers("dynamic")
    values = {stage.inputs[0].name: tokens(2)}
    received, exact = opened(stage, bf16())(values)[0], block().bind().evaluate(values)[0]
    assert drift(received, exact) < 2e-2
    stored = {value.dtype for value in prepare(stage, OpenvinoOptions(precision="bf16")).tensors().values()}
    assert torch.bfloat16 in stored and torch.int8 in stored


def test_a_precision_that_the_processor_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    stage = component(torch.nn.Linear(4, 3), torch.randn(2, 4)).step
    file = lower(stage, tmp_path, options=OPTIONS)
    monkeypatch.setattr(openvino, "Core", Old)
    with pytest.raises(UsageError, match=r"openvino.precision: expected one that this processor has \(FP32, INT8\)"):
        open_session(file, stage.inputs, stage.outputs, options=OpenvinoOptions(precision="bf16"))


# -- the written files


def test_files_and_ports(tmp_path: Path) -> None:
    stage = modulated().step
    file = lower(stage, tmp_path, options=OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.bin", "step.xml"] and file.name == "step.xml"
    model = openvino.Core().read_model(file)
    assert [node.any_name for node in model.inputs] == ["x", "t", "c"]
    assert all(node.partial_shape[0].is_dynamic for node in [*model.inputs, *model.outputs])
    stored = {node.get_element_type().get_type_name() for node in model.get_ops() if node.get_type_name() == "Constant"}
    assert "f16" not in stored, "weights are kept as they are"


def test_one_file_serves_any_batch(opened: Session) -> None:
    stage = modulated().step
    call = opened(stage)
    for batch in (1, 5, 2):
        values = {item.name: value.numpy() for item, value in zip(stage.inputs, modulated_example(batch), strict=True)}
        np.testing.assert_allclose(call(values)[0], reference(stage)(values)[0], rtol=1e-5, atol=1e-5)


def test_the_same_stage_gives_the_same_bytes(integers: Integers, tmp_path: Path) -> None:
    stage, _ = integers("static")
    for name in "ab":
        (tmp_path / name).mkdir()
        lower(stage, tmp_path / name, options=OPTIONS)
    for name in ("forward.xml", "forward.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_outputs_that_are_one_value_or_an_input(opened: Session) -> None:
    def twice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        return x, y, y

    stage = component(twice, torch.randn(2, 3)).step
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for received, wanted in zip(opened(stage)({stage.inputs[0].name: x}), (x, 2 * x, 2 * x), strict=True):
        np.testing.assert_array_equal(received, wanted)


# -- model classes


def captured(model: ZooModel) -> tuple[Program, Callable[[int], dict[str, np.ndarray]]]:
    from stepfold.frontend.calling import flatten

    program = model.program
    names = [item.name for item in program.inputs]

    def inputs(batch: int) -> dict[str, np.ndarray]:
        tensors, _ = flatten(model.kwargs(batch, seed=batch))
        return {name: tensors[name].numpy() for name in names}

    return program, inputs


@pytest.mark.slow
@pytest.mark.parametrize("model", EACH)
def test_float_parity(opened: Session, model: ZooModel) -> None:
    program, inputs = captured(model)
    call, run = opened(program.step), reference(program.step)
    for batch in (1, 5):
        for received, wanted in zip(call(inputs(batch)), run(inputs(batch)), strict=True):
            assert received.shape == wanted.shape and received.dtype == wanted.dtype
            np.testing.assert_allclose(received, wanted, rtol=0, atol=FLOAT * np.abs(wanted).max())


@pytest.mark.slow
@needs_vnni
@pytest.mark.parametrize("activations", ["dynamic", "symmetric"])
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "unet"])
def test_integer_parity(opened: Session, tmp_path: Path, name: str, activations: str) -> None:
    """Against the stage as the engine computes it, and no further from float than the reference is."""
    program, inputs = captured(BY_NAME[name])
    stage = quantized(program, activations, tmp_path)
    call, prepared, run = opened(stage), reference(prepare(stage, OPTIONS)), reference(stage)
    for batch in (1, 5):
        (received, *_), (wanted, *_) = call(inputs(batch)), prepared(inputs(batch))
        (exact, *_), (tensor, *_) = reference(program.step)(inputs(batch)), run(inputs(batch))
        assert drift(received, wanted) < INTEGER
        assert drift(received, exact) < 1.2 * drift(tensor, exact)


# -- what has no form


def test_an_operation_that_openvino_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    class Inner(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x)  # the line of the report

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 1

    stage = component(Model(), torch.randn(2, 3, 3)).step
    with pytest.raises(StepfoldError) as caught:
        lower(stage, tmp_path, options=OPTIONS)
    text = str(caught.value)
    assert "(inner; return torch.linalg.det(x)  # the line of the report): OpenVINO cannot read it" in text
    assert "Det" in text and len(text.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
