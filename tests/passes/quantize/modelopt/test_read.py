"""Decisions read back from Q/DQ models."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from qdq import Builder, four_bits, per_channel

from stepfold.loop.errors import StepfoldError
from stepfold.passes.quantize.modelopt.read import QuantizedInput, read_decisions

M, N = 4, 6
WEIGHT = np.random.default_rng(0).standard_normal((M, N)).astype(np.float32)
SCALE = np.float32(0.05)
ZEROS = np.zeros(N, np.int8)


def product(builder: Builder, weight: str, name: str = "linear_3") -> None:
    """x, quantized per tensor, times a weight."""
    builder.node("MatMul", [builder.pair("x", np.array(SCALE), np.array(0, np.int8)), weight], name)


def saved(builder: Builder, folder: Path, *outputs: str) -> Path:
    return builder.save(folder / "model.onnx", outputs or ("linear_3",), M)


def test_a_float_weight_that_the_model_quantizes(tmp_path: Path) -> None:
    """As modelopt writes int8: the weight stays float behind a Q/DQ pair."""
    builder = Builder()
    scale = per_channel(WEIGHT)
    product(builder, builder.pair(builder.store("w", WEIGHT), scale, ZEROS, axis=1))
    (name, decision), *others = read_decisions(saved(builder, tmp_path)).items()
    assert name == "linear_3" and not others
    assert decision.input == QuantizedInput(float(SCALE), 0, "int8") and decision.multiplier is None
    weight = decision.weight
    assert (weight.dtype, weight.group, weight.codes.dtype, weight.codes.shape) == ("int8", None, np.int8, (M, N))
    np.testing.assert_array_equal(weight.codes, np.rint(WEIGHT / scale))
    np.testing.assert_array_equal(weight.scale, scale)
    assert np.abs(weight.dequantized() - WEIGHT).max() <= scale.max() / 2 + 1e-7


def test_stored_codes(tmp_path: Path) -> None:
    """A weight that is already codes: with a zero point, per tensor, uint8."""
    builder = Builder()
    codes = np.arange(M * N, dtype=np.uint8).reshape(M, N) + 100
    parameters = [builder.store("s", np.array(0.5, np.float32)), builder.store("z", np.array(110, np.uint8))]
    product(builder, builder.node("DequantizeLinear", [builder.store("w", codes), *parameters], "w_dq"))
    weight = read_decisions(saved(builder, tmp_path))["linear_3"].weight
    assert weight.dtype == "uint8" and weight.scale.shape == weight.zero.shape == (N,)
    np.testing.assert_array_equal(weight.dequantized(), (codes.astype(np.float32) - 110) * 0.5)


def test_four_bits_in_groups(tmp_path: Path) -> None:
    """As modelopt writes int4: no quantized input, groups along the input channels, the last one short."""
    builder = Builder()
    codes = np.random.default_rng(1).integers(-8, 8, (5, N))
    scale = np.random.default_rng(2).uniform(0.1, 1, (2, N)).astype(np.float32)
    inputs = [builder.store("w", four_bits(codes, "w")), builder.store("s", scale)]
    weight = builder.node("DequantizeLinear", inputs, "w_dq", axis=0, block_size=3)
    builder.node("MatMul", ["x", weight], "linear_3")
    decision = read_decisions(builder.save(tmp_path / "model.onnx", ["linear_3"], 5))["linear_3"]
    assert decision.input is None and decision.weight.group == 3 and decision.weight.dtype == "int4"
    assert decision.weight.codes.dtype == np.int8
    wanted = codes * np.repeat(scale, 3, axis=0)[:5]
    np.testing.assert_allclose(decision.weight.dequantized(), wanted, rtol=1e-6)


def test_awq_multiplies_the_input(tmp_path: Path) -> None:
    builder = Builder()
    factors = np.linspace(0.5, 2, M, dtype=np.float32)
    multiplied = builder.node("Mul", ["x", builder.store("x_pre_quant_scale", factors[None])], "x_scaled")
    builder.node(
        "MatMul", [multiplied, builder.pair(builder.store("w", WEIGHT), per_channel(WEIGHT), ZEROS, axis=1)], "linear_3"
    )
    decision = read_decisions(saved(builder, tmp_path))["linear_3"]
    assert decision.multiplier is not None
    np.testing.assert_array_equal(decision.multiplier, factors)


def test_a_product_of_the_model_is_no_multiplier(tmp_path: Path) -> None:
    builder = Builder()
    multiplied = builder.node("Mul", ["x", builder.store("gain", np.ones((1, M), np.float32))], "x_scaled")
    builder.node(
        "MatMul", [multiplied, builder.pair(builder.store("w", WEIGHT), per_channel(WEIGHT), ZEROS, axis=1)], "linear_3"
    )
    assert read_decisions(saved(builder, tmp_path))["linear_3"].multiplier is None


def test_eight_bit_floats(tmp_path: Path) -> None:
    """FP8 codes are the nearest e4m3 numbers, and saturate at 448."""
    builder = Builder()
    scale = (np.abs(WEIGHT).max(axis=0) / 448).astype(np.float32)
    scale[0] /= 2  # its largest value saturates
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, (N,), np.zeros(N, np.float32))
    builder.node("MatMul", ["x", builder.pair(builder.store("w", WEIGHT), scale, zero, axis=1)], "linear_3")
    weight = read_decisions(saved(builder, tmp_path))["linear_3"].weight
    assert weight.dtype == "float8_e4m3fn" and weight.codes.dtype == ml_dtypes.float8_e4m3fn
    assert np.abs(weight.codes[:, 0].astype(np.float32)).max() == 448
    error = np.abs(weight.dequantized() - WEIGHT)[:, 1:]
    assert (error <= np.abs(WEIGHT[:, 1:]) / 16 + scale[1:] * 2**-9).all()  # three bits of mantissa


def test_transposed_gemm(tmp_path: Path) -> None:
    """Gemm with transB holds its weight as [N, M] with scales along axis 0."""
    builder = Builder()
    scale = per_channel(WEIGHT)
    pair = builder.pair(builder.store("w", np.ascontiguousarray(WEIGHT.T)), scale, ZEROS, axis=0)
    builder.node("Gemm", ["x", pair], "linear_3", transB=1)
    weight = read_decisions(saved(builder, tmp_path))["linear_3"].weight
    np.testing.assert_array_equal(weight.codes, np.rint(WEIGHT / scale))


def test_constants_count_as_stored(tmp_path: Path) -> None:
    builder = Builder()
    tensor = onnx.numpy_helper.from_array(WEIGHT)
    builder.node("Constant", [], "w", value=tensor)
    product(builder, builder.pair("w", per_channel(WEIGHT), ZEROS, axis=1))
    assert list(read_decisions(saved(builder, tmp_path))) == ["linear_3"]


def test_what_stayed_float_has_no_decision(tmp_path: Path) -> None:
    """A float layer, one of which only the input is quantized, and a product of two activations."""
    builder = Builder()
    square = builder.store("square", np.eye(M, dtype=np.float32))
    builder.node("MatMul", ["x", builder.store("w", WEIGHT)], "float")
    product(builder, square, "input_only")
    builder.node("Transpose", ["x"], "t", perm=[0, 2, 1])
    builder.node("MatMul", ["x", builder.pair("t", np.array(SCALE), np.array(0, np.int8))], "attention")
    assert read_decisions(saved(builder, tmp_path, "float", "input_only", "attention")) == {}


@given(hnp.arrays(np.float32, (M, N), elements=st.floats(-4, 4, width=32)), st.integers(-20, 20))
def test_codes_are_those_of_the_engine(tmp_path_factory: pytest.TempPathFactory, weight: np.ndarray, zero: int) -> None:
    """The codes that are computed from a float weight dequantize to what ONNX Runtime's Q/DQ pair gives."""
    import onnxruntime

    builder = Builder()
    scale = np.full(N, 4 / 120, np.float32)
    pair = builder.pair(builder.store("w", weight), scale, np.full(N, zero, np.int8), axis=1)
    builder.node("MatMul", ["x", pair], "linear_3")
    path = saved(builder, tmp_path_factory.mktemp("codes"))
    session = onnxruntime.InferenceSession(str(path))
    rows = np.asarray(session.run(None, {"x": np.eye(M, dtype=np.float32)[None, :3]})[0])
    np.testing.assert_allclose(read_decisions(path)["linear_3"].weight.dequantized()[:3], rows[0], atol=1e-6)


def broken(tmp_path: Path, case: str) -> Path:
    builder, pair = Builder(), ""
    if case == "rank":
        pair = builder.pair(builder.store("w", np.ones((1, M, N), np.float32)), np.array(SCALE), np.array(0, np.int8))
    elif case == "axis":
        pair = builder.pair(builder.store("w", WEIGHT), np.ones(M, np.float32), np.zeros(M, np.int8), axis=0)
    elif case == "codes":
        pair = builder.pair(builder.store("w", WEIGHT), np.ones(N, np.float32), np.zeros(N, np.int16), axis=1)
    elif case == "computed":
        builder.node("ReduceMax", ["x"], "s", keepdims=0)
        codes = builder.store("w", np.ones((M, N), np.int8))
        pair = builder.node("DequantizeLinear", [codes, "s"], "pair")
    if case == "input":
        rows = builder.pair("x", np.ones(3, np.float32), np.zeros(3, np.int8), axis=1)
        pair = builder.pair(builder.store("w", WEIGHT), per_channel(WEIGHT), ZEROS, axis=1)
        builder.node("MatMul", [rows, pair], "linear_3")
    else:
        builder.node("MatMul", ["x", pair], "linear_3")
    return saved(builder, tmp_path)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("rank", "MatMul linear_3: expected 2; received a weight of rank 3. Exclude this layer"),
        ("axis", "received scales along axis 0 of the weight"),
        ("codes", "received codes of type INT16"),
        ("computed", "DequantizeLinear pair: expected a stored one; received a scale that is computed"),
        ("input", "expected one scale for the tensor; received an input with 3 scales"),
    ],
)
def test_forms_that_are_not_understood(tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises(StepfoldError, match=r"model\.onnx") as caught:
        read_decisions(broken(tmp_path, case))
    assert message in str(caught.value)


def test_no_onnx_file(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\xff\xff not a model")
    with pytest.raises(StepfoldError, match="expected an ONNX model; received"):
        read_decisions(file)
    with pytest.raises(StepfoldError, match="expected an ONNX model; received"):
        read_decisions(tmp_path / "missing.onnx")
