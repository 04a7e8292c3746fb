"""Asymmetric uint8 activations, in numbers."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from stepfold.ir import operators  # noqa: F401  (registers the stepfold:: operators)
from stepfold.passes.quantize.algebra.int8 import LEVELS, activation_range, centring_offset


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (-1.0, 1.55, 0.01, 100),
        (0.5, 2.55, 0.01, 0),  # zero is always covered
        (-2.55, -0.5, 0.01, 255),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_activation_range(low: float, high: float, scale: float, zero: int) -> None:
    received_scale, received_zero = activation_range(low, high)
    assert received_scale.item() == pytest.approx(scale) and received_zero.item() == zero
    assert (received_scale.dtype, received_zero.dtype) == (torch.float32, torch.uint8)


@given(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32))
def test_the_ends_of_a_range_do_not_saturate(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assume(not 0 < max(abs(low), abs(high)) < 1e-30)  # a scale below the normal floats has no bits
    scale, zero = activation_range(low, high)
    x = torch.tensor([low, high, 0.0])
    q = torch.ops.stepfold.quantize_static(x, scale, zero)
    back = scale * (q.float() - zero.float())
    assert (back - x).abs().max() <= scale * 1.01
    assert back[2] == 0  # zero is exact: padding and masks stay what they are


# -- one-sided values


def test_offset_by_hand() -> None:
    """low = 0: exactly half of the range, 127 steps. low = -high / 5: k = floor(127 * 4 / 6) = 84, s = high / 211."""
    assert centring_offset(0.0, 254.0) == pytest.approx(127.0)
    assert centring_offset(-42.2, 211.0) == pytest.approx(84.0)
    assert centring_offset(3.0, 254.0) == pytest.approx(127.0)  # zero is always covered


@given(st.floats(0, 0.25), st.floats(0.01, 1000))
def test_a_shifted_value_uses_all_codes_and_zero_is_one_of_them(part: float, high: float) -> None:
    low = -part * high
    offset = centring_offset(low, high)
    assert offset is not None
    scale = (high - offset) / LEVELS
    assert offset / scale == pytest.approx(round(offset / scale), abs=1e-6)
    assert -LEVELS * (1 + 1e-9) <= (low - offset) / scale <= -LEVELS + 2  # within two steps of the end
    assert scale <= 0.63 * high / LEVELS
    assert centring_offset(-high, -low) == -offset


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-1.0, 3.9), (-3.9, 1.0), (0.0, 0.0)])
def test_other_values_stay(low: float, high: float) -> None:
    assert centring_offset(low, high) is None
