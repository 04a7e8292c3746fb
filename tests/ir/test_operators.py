"""Each stepfold:: operator against the formula of its specification, written in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stepfold.ir.operators import RECORDS, Operator
from stepfold.ir.operators.record import Arguments

stepfold = torch.ops.stepfold
ATTENTION = 1e-6  # float32, sums of a few terms
FINITE = st.floats(-1e3, 1e3, width=32)
VALUES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=FINITE)


def dynamic_quantize_linear(x: np.ndarray) -> tuple[np.ndarray, np.float32, np.uint8]:
    """ONNX DynamicQuantizeLinear: y_scale = (max(0, max x) - min(0, min x)) / 255, y_zero = saturate(round(-min / scale)),
    y = saturate(round(x / y_scale) + y_zero), rounding half to even. A scale of zero is taken as one."""
    low, high = np.float32(min(0, x.min())), np.float32(max(0, x.max()))
    scale = np.float32(high - low) / np.float32(255) or np.float32(1)
    zero = np.uint8(np.clip(np.rint((np.float32(0) - low) / scale), 0, 255))
    return np.clip(np.rint(x / scale) + np.float32(zero), 0, 255).astype(np.uint8), scale, zero


def quantize_linear(x: np.ndarray, scale: np.float32, zero: np.uint8) -> np.ndarray:
    """ONNX QuantizeLinear: y = saturate(round(x / y_scale) + y_zero_point)."""
    return np.clip(np.rint(x / scale) + np.float32(zero), 0, 255).astype(np.uint8)


def integer_linear(q, scale, zero, weight, weight_scale, bias) -> np.ndarray:
    """MatMulIntegerToFloat: (A - a_zero)(B - 0) in int32, times a_scale b_scale, plus the bias."""
    product = (q.astype(np.int64) - np.int64(zero)) @ weight.astype(np.int64)
    return product * (np.float64(scale) * weight_scale) + (0 if bias is None else bias)


def attention(query, key, value, heads: int, scale: float) -> np.ndarray:
    """ONNX Attention (opset 23) on [B, T, H K]: softmax(scale Q K^T) V by head."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3).astype(np.float64) for x in (query, key, value))
    logits = scale * q @ k.transpose(0, 1, 3, 2)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    merged = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)
    return merged.reshape(*query.shape[:2], -1)


@given(VALUES)
def test_dynamic_quantization(x: np.ndarray) -> None:
    q, scale, zero = stepfold.quantize_dynamic(torch.from_numpy(x))
    wanted_q, wanted_scale, wanted_zero = dynamic_quantize_linear(x)
    assert (q.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float32, torch.uint8)
    assert scale.item() == wanted_scale and zero.item() == wanted_zero
    np.testing.assert_array_equal(q.numpy(), wanted_q)


@given(VALUES)
def test_dynamic_quantization_is_within_a_step(x: np.ndarray) -> None:
    """The property the formula is for: half a step, and half of one more at the ends, where the zero was rounded."""
    assume(np.abs(x).max() > 1e-30)  # a scale below the normal floats has no bits
    q, scale, zero = stepfold.quantize_dynamic(torch.from_numpy(x))
    back = scale.item() * (q.numpy().astype(np.float64) - zero.item())
    assert np.abs(back - x).max() <= scale.item() * 1.001


@pytest.mark.parametrize(
    ("x", "scale", "zero", "q"),
    [
        ([0.0, 0.0], 1.0, 0, [0, 0]),
        ([-2.55, -1.0], 0.01, 255, [0, 155]),  # 255 steps of 0.01 below zero
        ([1.0, 2.55], 0.01, 0, [100, 255]),
        ([-1.0, 1.55], 0.01, 100, [0, 255]),
        ([0.5, 1.5, 2.5, 255.0], 1.0, 0, [0, 2, 2, 255]),  # halves to even
    ],
)
def test_dynamic_quantization_by_hand(x: list[float], scale: float, zero: int, q: list[int]) -> None:
    received = stepfold.quantize_dynamic(torch.tensor(x))
    assert received[0].tolist() == q
    assert received[1].item() == pytest.approx(scale, rel=1e-6)
    assert received[2].item() == zero


@given(VALUES, st.floats(0.015625, 8.0, width=32), st.integers(0, 255))
def test_static_quantization(x: np.ndarray, scale: float, zero: int) -> None:
    received = stepfold.quantize_static(torch.from_numpy(x), torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8))
    assert received.dtype == torch.uint8
    np.testing.assert_array_equal(received.numpy(), quantize_linear(x, np.float32(scale), np.uint8(zero)))


def test_static_quantization_saturates() -> None:
    x, zero = torch.tensor([-1000.0, 0.0, 1000.0]), torch.tensor(10, dtype=torch.uint8)
    assert stepfold.quantize_static(x, torch.tensor(1.0), zero).tolist() == [0, 10, 255]


@given(
    st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 7), st.booleans()
)
def test_integer_linear(data: st.DataObject, rows: list[int], M: int, N: int, biased: bool) -> None:
    q = data.draw(hnp.arrays(np.uint8, (*rows, M)))
    weight = data.draw(hnp.arrays(np.int8, (M, N), elements=st.integers(-127, 127)))
    weight_scale = data.draw(hnp.arrays(np.float32, N, elements=st.floats(2**-10, 1, width=32)))
    bias = data.draw(hnp.arrays(np.float32, N, elements=st.floats(-4, 4, width=32))) if biased else None
    zero = data.draw(st.integers(0, 255))
    arguments = (
        torch.from_numpy(q),
        torch.tensor(0.25),
        torch.tensor(zero, dtype=torch.uint8),
        torch.from_numpy(weight),
    )
    received = stepfold.qlinear(
        *arguments, torch.from_numpy(weight_scale), None if bias is None else torch.from_numpy(bias)
    )
    wanted = integer_linear(q, 0.25, zero, weight, weight_scale, bias)
    assert received.shape == (*rows, N) and received.dtype == torch.float32
    np.testing.assert_allclose(received.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_whole_quantized_linear_is_near_the_linear() -> None:
    """x W^T + b with 8 bits on both sides: within 1 % of the largest output."""
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(3, 5, 16, generator=generator), torch.randn(6, 16, generator=generator)
    weight_scale = W.abs().amax(1) / 127
    weight = (W / weight_scale[:, None]).round().to(torch.int8).T.contiguous()
    received = stepfold.qlinear(*stepfold.quantize_dynamic(x), weight, weight_scale, torch.ones(6))
    wanted = torch.nn.functional.linear(x, W, torch.ones(6))
    assert (received - wanted).abs().max() < 0.01 * wanted.abs().max()


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4),
    st.floats(0.0625, 2.0, width=32), st.integers(0, 99),
)  # fmt: skip
def test_attention(B: int, T: int, keys: int, H: int, K: int, V: int, scale: float, seed: int) -> None:
    """Cross attention, and values of another width, included."""
    random = np.random.default_rng(seed)
    shapes = ((B, T, H * K), (B, keys, H * K), (B, keys, H * V))
    q, k, v = (random.standard_normal(shape).astype("float32") for shape in shapes)
    received = stepfold.attention(*(torch.from_numpy(x) for x in (q, k, v)), H, scale)
    assert received.shape == (B, T, H * V)
    np.testing.assert_allclose(received.numpy(), attention(q, k, v, H, scale), rtol=1e-5, atol=ATTENTION)


@given(
    seed=st.integers(0, 1000), B=st.integers(1, 3), T=st.integers(1, 5), H=st.integers(1, 3), pairs=st.integers(1, 4)
)
def test_rotary(seed: int, B: int, T: int, H: int, pairs: int) -> None:
    """Pairs of features as complex numbers, times e^(i angle), in both layouts."""
    random = np.random.default_rng(seed)
    x, angles = random.standard_normal((B, T, H, 2 * pairs)), random.standard_normal((T, pairs))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    wanted = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    tables = [torch.from_numpy(table) for table in (np.cos(angles), np.sin(angles))]
    received = stepfold.rotary(torch.from_numpy(x), *tables, False)
    np.testing.assert_allclose(received.numpy(), wanted, rtol=1e-12, atol=1e-12)
    heads_first = stepfold.rotary(torch.from_numpy(x).transpose(1, 2), *tables, True).transpose(1, 2)
    np.testing.assert_array_equal(heads_first.numpy(), received.numpy())


def blocked(blocks: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, M: int) -> np.ndarray:
    """MatMulNBits, 4 bits: the low nibble comes first, `(code - zero) * scale`, zero 8 where none is given."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(len(blocks), -1)[:, :M].astype(np.float64)
    block = 2 * blocks.shape[2]
    packed = (
        np.full(scales.shape, 8) if zeros is None else np.stack([zeros & 15, zeros >> 4], -1).reshape(len(zeros), -1)
    )
    scale, zero = (np.repeat(x[:, : scales.shape[1]], block, 1)[:, :M] for x in (scales, packed))
    return (codes - zero) * scale


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("M", [32, 24])
def test_blocked_linear(M: int, biased: bool) -> None:
    """Every code, the last block not full; activations as they are, and rounded within half a step of each block."""
    random = np.random.default_rng(M)
    blocks = random.integers(0, 256, (5, 2, 8), dtype=np.uint8)
    scales = random.uniform(0.1, 1, (5, 2)).astype(np.float32)
    zeros = random.integers(0, 256, (5, 1), dtype=np.uint8) if biased else None
    bias = random.standard_normal(5).astype(np.float32) if biased else None
    x = random.standard_normal((3, 4, M)).astype(np.float32)
    held = [None if value is None else torch.from_numpy(value) for value in (zeros, bias)]
    exact, rounded = (
        stepfold.blocked_linear(
            torch.from_numpy(x), torch.from_numpy(blocks), torch.from_numpy(scales), *held, 4, 16, rounds
        ).numpy()
        for rounds in (False, True)
    )
    weight = blocked(blocks, scales, zeros, M)
    np.testing.assert_allclose(exact, x @ weight.T + (0 if bias is None else bias), rtol=1e-4, atol=1e-4)
    half_step = np.abs(x).max() / 127 / 2 * np.abs(weight).sum(1)
    assert (np.abs(rounded - exact) <= half_step * 1.001).all() and (rounded != exact).any()


@given(VALUES, st.floats(0.015625, 8.0, width=32))
def test_fp8_is_that_of_pytorch(x: np.ndarray, scale: float) -> None:
    received = stepfold.round_fp8(torch.from_numpy(x), torch.tensor(scale))
    wanted = (torch.from_numpy(x) / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32) * scale
    assert torch.equal(received, wanted)


def test_nvfp4_by_hand() -> None:
    """The largest of a block is 6 of its scale, which is an E4M3 multiple of the unit; ties go to the even code."""
    x = torch.tensor([6.0, -3.0, 0.25, 0.75, 1.25, 5.0, 0.1, 0.0] * 2)
    received = stepfold.round_nvfp4(x[None], torch.tensor(1.0))
    assert received[0, :8].tolist() == [6.0, -3.0, 0.0, 1.0, 1.0, 4.0, 0.0, 0.0]
    codes = torch.tensor([[0x57, 0xF1]], dtype=torch.uint8)  # 6, 3, 0.5, -6, low nibbles first
    packed = torch.nn.functional.pad(codes, (0, 6))
    scale = torch.tensor([[2.0]]).to(torch.float8_e4m3fn)
    assert stepfold.decode_nvfp4(packed, scale, torch.tensor(0.5))[0, :4].tolist() == [6.0, 3.0, 0.5, -6.0]


def test_codebook_by_hand() -> None:
    codebook = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    received = stepfold.decode_codebook(torch.tensor([[1, 0]], dtype=torch.uint8), codebook, torch.tensor([10.0]))
    assert received.tolist() == [[30.0, 40.0, 10.0, 20.0]]


EXAMPLES = [
    pytest.param(record, arguments, id=f"{record.reference.__name__}-{i}")
    for record in RECORDS.values()
    for i, arguments in enumerate(record.examples())
]


def test_every_operator_shows_what_it_does() -> None:
    assert all(record.examples() for record in RECORDS.values())


@pytest.mark.parametrize(("record", "arguments"), EXAMPLES)
def test_schema_and_fake_kernel_agree_with_the_reference(record: Operator, arguments: Arguments) -> None:
    """PyTorch's own check: shapes and dtypes of the fake kernel, no aliasing, no mutation."""
    eighths = any(getattr(argument, "dtype", None) is torch.float8_e4m3fn for argument in arguments)
    # the check for mutation multiplies its arguments, which PyTorch cannot do in FP8
    checks = ("test_faketensor",) if eighths else ("test_schema", "test_faketensor")
    torch.library.opcheck(record.overload, tuple(arguments), test_utils=checks)


@pytest.mark.parametrize(("record", "arguments"), EXAMPLES)
def test_the_portable_form_computes_the_same(record: Operator, arguments: Arguments) -> None:
    if record.portable is not None:
        torch.testing.assert_close(record.portable(*arguments), record.overload(*arguments))
