"""Each stepfold:: operator against the formula of its specification, written in NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stepfold.ir.operators import OPERATORS

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


@given(VALUES)
def test_fast_gelu(x: np.ndarray) -> None:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    wide = x.astype(np.float64)
    wanted = wide / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    np.testing.assert_allclose(stepfold.fast_gelu(torch.from_numpy(x)).numpy(), wanted, rtol=1e-5, atol=1e-6)


ZERO = torch.tensor(3, dtype=torch.uint8)
WEIGHT, WEIGHT_SCALE = torch.randint(-127, 128, (4, 6), dtype=torch.int8), torch.rand(6)
Q = torch.randint(0, 256, (2, 3, 4), dtype=torch.uint8)
EXAMPLES: dict[Callable, list[tuple]] = {
    stepfold.quantize_dynamic.default: [(torch.randn(2, 3, 4),), (torch.zeros(5),), (-torch.rand(2, 4),)],
    stepfold.quantize_static.default: [(torch.randn(2, 3, 4), torch.tensor(0.1), ZERO)],
    stepfold.qlinear.default: [
        (Q, torch.tensor(0.1), ZERO, WEIGHT, WEIGHT_SCALE, torch.rand(6)),
        (Q[0], torch.tensor(0.1), ZERO, WEIGHT, WEIGHT_SCALE, None),
    ],
    stepfold.attention.default: [
        (torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8), 2, 0.5),
        (torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 4), 2, 0.5),
    ],
    stepfold.fast_gelu.default: [(torch.randn(2, 3, 4),), (torch.randn(()),)],
}


def test_every_operator_has_an_example() -> None:
    assert set(EXAMPLES) == set(OPERATORS)


@pytest.mark.parametrize(("operator", "index"), [(o, i) for o, given_ in EXAMPLES.items() for i in range(len(given_))])
def test_schema_and_fake_kernel_agree_with_the_reference(operator, index: int) -> None:
    """PyTorch's own check: shapes and dtypes of the fake kernel, no aliasing, no mutation."""
    torch.library.opcheck(operator, EXAMPLES[operator][index], test_utils=("test_schema", "test_faketensor"))
