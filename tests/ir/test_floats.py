"""Small floating-point formats against their tables and PyTorch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepfold.ir.floats import E2M1, E4M3, FloatFormat

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_e2m1_values() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert E2M1.decode(codes, torch.float32).tolist() == E2M1_VALUES + [-value for value in E2M1_VALUES]


def test_e2m1_ties_go_to_the_even_code() -> None:
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1.nearest(middles).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_beyond_the_largest_saturates() -> None:
    assert E2M1.nearest(torch.tensor([5.1, 7.0, -1e30])).tolist() == [6.0, 6.0, -6.0]
    assert E4M3.nearest(torch.tensor([449.0, 1e30, -500.0])).tolist() == [448.0, 448.0, -448.0]


def test_there_is_one_zero() -> None:
    assert E4M3.encode(torch.tensor([0.0, -0.0, -1e-9])).tolist() == [0, 0, 0]


def test_e4m3_is_that_of_torch() -> None:
    """Every code, and every middle of two neighbours, where ties show."""
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(torch.float8_e4m3fn).to(torch.float32)
    numbers = torch.isfinite(theirs)
    assert int(numbers.sum()) == 254  # two codes name no number
    torch.testing.assert_close(E4M3.decode(codes, torch.float32)[numbers], theirs[numbers], rtol=0, atol=0)
    ascending = theirs[numbers].unique()
    middles = (ascending[1:] + ascending[:-1]) / 2
    expected = middles.to(torch.float8_e4m3fn).to(torch.float32)
    torch.testing.assert_close(E4M3.nearest(middles), expected, rtol=0, atol=0)


@given(st.lists(st.floats(-448, 448, width=32), min_size=1))
def test_e4m3_rounds_as_torch(values: list[float]) -> None:
    received = torch.tensor(values)
    expected = received.to(torch.float8_e4m3fn).to(torch.float32)
    assert E4M3.nearest(received).tolist() == expected.tolist()


@pytest.mark.parametrize("format", [E2M1, E4M3])
@given(values=st.lists(st.floats(-600, 600), min_size=1))
def test_nothing_is_nearer(format: FloatFormat, values: list[float]) -> None:
    received = torch.tensor(values, dtype=torch.float64)
    codes = torch.arange(2**format.bits, dtype=torch.uint8)
    table = format.decode(codes, torch.float64)
    table = table[table.abs() <= format.largest]
    distance = (received[:, None] - table).abs().amin(dim=1)
    assert ((format.nearest(received) - received).abs() == distance).all()


@pytest.mark.parametrize("format", [E2M1, E4M3])
def test_codes_of_values_are_themselves(format: FloatFormat) -> None:
    codes = torch.arange(2 ** (format.bits - 1), dtype=torch.uint8)
    codes = codes[format.decode(codes, torch.float64) <= format.largest]
    assert format.encode(format.decode(codes, torch.float64)).tolist() == codes.tolist()
