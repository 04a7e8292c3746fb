"""Rounding grids: formulas, storage, the reference table of errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stepfold.ir import operators  # noqa: F401  (registers the stepfold:: operators)
from stepfold.ir.floats import E2M1, E4M3
from stepfold.loop.errors import UsageError
from stepfold.passes.quantize.algebra.errors import drift
from stepfold.passes.quantize.algebra.grids import (
    FP8_CHANNEL,
    FP8_TENSOR,
    INT8_CHANNEL,
    MXFP4,
    MXFP8,
    NVFP4,
    FloatGrid,
    Grid,
    IntegerGrid,
    Quantized,
    nearest_divisor,
)

ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(32)), elements=st.floats(-8, 8, width=16))
GRIDS: dict[str, Grid] = {
    **{f"int{bits}": IntegerGrid(bits, 8) for bits in (2, 3, 4, 8)},
    **{f"uint{bits}": IntegerGrid(bits, 8, symmetric=False) for bits in (2, 3, 4, 8)},
    "int8 row": INT8_CHANNEL,
    "int8 tensor": IntegerGrid(8, "tensor"),
    "uint8 tensor": IntegerGrid(8, "tensor", symmetric=False),
    "fp8 tensor": FP8_TENSOR,
    "fp8 row": FP8_CHANNEL,
    "fp4": FloatGrid(E2M1, 16),
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


# -- what every grid keeps


@each_grid
@given(array=ROWS)
def test_rounding_is_what_codes_decode_to_and_stays(grid: Grid, array: np.ndarray) -> None:
    weight = torch.from_numpy(array)
    scales = grid.scales(weight)
    codes = grid.encode(weight, scales)
    rounded = grid.round(weight, scales)
    assert torch.equal(grid.decode(codes, scales), rounded)
    assert torch.equal(grid.encode(rounded, scales), codes)
    assert torch.equal(Quantized.of(weight, grid).weight, grid.nearest(weight))
    assert rounded.dtype == weight.dtype and rounded.shape == weight.shape
    assert (scales.scale > 0).all()
    assert (rounded[weight == 0] == 0).all()


@each_grid
def test_rows_and_columns_have_their_scales(grid: Grid) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = grid.scales(weight)
    N, M = {"tensor": (1, 1), "row": (4, 1)}.get(str(grid.group)) or (4, 64 // int(grid.group))
    assert scales.scale.shape == (N, M)
    scale, zero = scales.of_columns()
    assert scale.shape == (N, 64)
    assert torch.equal(scale[:, :: scales.group], scales.scale)
    assert (zero is None) == (scales.zero is None)


@each_grid
def test_float64_and_float32_agree(grid: Grid) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide, narrow = Quantized.of(weight, grid), Quantized.of(weight.float(), grid)
    assert (wide.codes == narrow.codes).double().mean() > 0.99  # float32 may fall on the other side of a tie
    torch.testing.assert_close(wide.scales.scale.float(), narrow.scales.scale)


@each_grid
def test_zeros_stay_zeros(grid: Grid) -> None:
    weight = torch.zeros(2, 32)
    assert torch.equal(grid.nearest(weight), weight)


@each_grid
def test_columns_that_are_not_finite(grid: Grid) -> None:
    weight = torch.zeros(2, 32)
    weight[1, 3] = float("nan")
    with pytest.raises(UsageError, match=r"weight: expected finite numbers; received NaN or infinity"):
        grid.scales(weight)


@pytest.mark.parametrize(("group", "near"), [(5, 4), (17, 16), (100, 64), (0, 1)])
@pytest.mark.parametrize("of_integers", [True, False])
def test_groups_that_do_not_divide(group: int, near: int, of_integers: bool) -> None:
    grid = IntegerGrid(4, group) if of_integers else FloatGrid(E2M1, group)
    message = f"group: expected a divisor of the 64 input features; received {group}. Try {near}."
    with pytest.raises(UsageError) as error:
        grid.scales(torch.zeros(2, 64))
    assert str(error.value) == message


@given(st.integers(1, 300), st.integers(-5, 400))
def test_no_divisor_is_nearer(number: int, wanted: int) -> None:
    received = nearest_divisor(number, wanted)
    assert number % received == 0
    assert all(number % d or abs(d - wanted) >= abs(received - wanted) for d in range(1, number + 1))


# -- integers


def test_symmetric_by_hand() -> None:
    """max |w| = 7 gives scale 1; halves round to even; -8 is reached only under scales of another weight."""
    grid = IntegerGrid(4, 4)
    weight = torch.tensor([[7.0, -2.5, 0.4, -7.0]])
    scales = grid.scales(weight)
    assert scales.scale.tolist() == [[1.0]] and scales.zero is None
    assert grid.encode(weight, scales).tolist() == [[7, -2, 0, -7]]
    assert grid.encode(torch.tensor([[9.0, -9.0, -7.6, 1.0]]), scales).tolist() == [[7, -8, -8, 1]]
    assert grid.encode(weight, scales).dtype == torch.int8


def test_asymmetric_by_hand() -> None:
    """-1 to 2 in fifteen steps of 0.2: zero is code 5. A range of one sign goes on to zero."""
    grid = IntegerGrid(4, 2, symmetric=False)
    weight = torch.tensor([[-1.0, 2.0, 3.0, 1.5]])
    scales = grid.scales(weight)
    assert scales.scale.tolist() == [pytest.approx([0.2, 0.2])]
    assert scales.zero is not None and scales.zero.tolist() == [[5, 0]]
    assert grid.encode(weight, scales).tolist() == [[0, 15, 15, 8]]  # 1.5 / 0.2 = 7.5
    assert grid.encode(weight, scales).dtype == torch.uint8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@given(array=ROWS)
def test_error_is_at_most_half_a_step(bits: int, symmetric: bool, array: np.ndarray) -> None:
    """An asymmetric zero point is rounded too, which moves one end of the range by up to half a step more."""
    weight = torch.from_numpy(array).double()
    grid = IntegerGrid(bits, 8, symmetric)
    scales = grid.scales(weight)
    scale, _ = scales.of_columns()
    limit = 0.5 if symmetric else 1.0
    assert ((grid.round(weight, scales) - weight).abs() <= limit * scale * (1 + 1e-9)).all()


def test_unsigned_tensors_are_those_of_the_operator() -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    q, scale, zero = torch.ops.stepfold.quantize_dynamic(x)
    quantized = Quantized.of(x, IntegerGrid(8, "tensor", symmetric=False))
    assert torch.equal(quantized.codes, q)
    assert quantized.scales.zero is not None
    assert (quantized.scales.scale.item(), quantized.scales.zero.item()) == (scale.item(), zero.item())


def test_bits_of_integers() -> None:
    with pytest.raises(UsageError, match=r"bits: expected one of 2, 3, 4, 8; received 5\."):
        IntegerGrid(5)


# -- floats


def test_nvfp4_has_two_levels() -> None:
    """Block scales are FP8 multiples of one float, chosen so that the largest block has the largest FP8 scale."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = NVFP4.scales(weight)
    assert scales.unit is not None
    assert scales.unit.item() == pytest.approx(weight.abs().max().item() / (6 * 448))
    blocks = scales.scale / scales.unit
    torch.testing.assert_close(E4M3.nearest(blocks), blocks)
    wanted = E4M3.nearest(weight.unflatten(1, (4, 16)).abs().amax(-1) / (6 * scales.unit))
    torch.testing.assert_close(blocks, wanted)
    assert blocks.max().item() == pytest.approx(448)


def test_nvfp4_blocks_too_small_for_their_scale() -> None:
    """A block far below the largest one keeps the smallest scale there is instead of zero."""
    weight = torch.full((1, 32), 1e-9, dtype=torch.float64)
    weight[0, 0] = 1.0
    scales = NVFP4.scales(weight)
    assert scales.unit is not None
    assert (scales.scale / scales.unit).tolist() == [[448.0, 2.0**-9]]
    assert NVFP4.round(weight, scales)[0, 16:].tolist() == [0.0] * 16


@pytest.mark.parametrize(("grid", "exponent"), [(MXFP4, 2), (MXFP8, 8)])
def test_mx_scales_are_powers_of_two(grid: FloatGrid, exponent: int) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    largest = weight.unflatten(1, (2, 32)).abs().amax(-1)
    wanted = 2.0 ** (torch.floor(torch.log2(largest)) - exponent)
    assert torch.equal(grid.scales(weight).scale, wanted)


def test_mx_may_saturate() -> None:
    """7.9 has the scale of 4: it is the largest element, and 6 is the largest value."""
    weight = torch.full((1, 32), 7.9)
    assert MXFP4.nearest(weight)[0, 0].item() == 6.0
    assert IntegerGrid(4, 32).nearest(weight)[0, 0].item() == pytest.approx(7.9)


# -- size and the reference table

BITS = [  # of a weight [128, 256], by hand
    (IntegerGrid(4, 64), 4 + 32 / 64),
    (IntegerGrid(4, 64, symmetric=False), 4 + 36 / 64),
    (IntegerGrid(2, 32), 3.0),
    (INT8_CHANNEL, 8 + 32 / 256),
    (FP8_TENSOR, 8 + 32 / (128 * 256)),
    (FP8_CHANNEL, 8 + 32 / 256),
    (NVFP4, 4.5 + 32 / (128 * 256)),
    (MXFP4, 4.25),
    (MXFP8, 8.25),
]


@pytest.mark.parametrize(("grid", "bits"), BITS, ids=[str(grid) for grid, _ in BITS])
def test_bits_per_weight(grid: Grid, bits: float) -> None:
    assert grid.bits_per_weight(128, 256) == pytest.approx(bits)


COLUMNS = [NVFP4, MXFP4, *(IntegerGrid(4, group) for group in (16, 32, 64, 128)), FP8_TENSOR, IntegerGrid(8)]
TABLE = {  # relative error of rounding 1024 x 1024 to the nearest
    "Gaussian": [0.0952, 0.115, 0.0852, 0.0971, 0.1077, 0.1174, 0.0264, 0.0079],
    "Laplace": [0.0926, 0.127, 0.101, 0.121, 0.141, 0.161, 0.0265, 0.0123],
    "Student": [0.0917, 0.131, 0.106, 0.131, 0.160, 0.193, 0.0264, 0.0186],
}


def samples(name: str) -> torch.Tensor:
    distributions = torch.distributions
    draws = {
        "Gaussian": distributions.Normal(0.0, 1.0),
        "Laplace": distributions.Laplace(0.0, 1.0),
        "Student": distributions.StudentT(4.0),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return draws[name].sample(torch.Size((1024, 1024)))


@pytest.mark.parametrize("name", TABLE)
def test_errors_are_those_of_the_table(name: str) -> None:
    weight = samples(name)
    received = [drift(grid.nearest(weight), weight) for grid in COLUMNS]
    assert received == pytest.approx(TABLE[name], rel=0.02)


def test_int8_both_sides_on_a_gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(512, 512, generator=generator), torch.randn(1024, 512, generator=generator)
    rounded = IntegerGrid(8, "tensor", symmetric=False).nearest(x) @ INT8_CHANNEL.nearest(weight).T
    assert drift(rounded, x @ weight.T) <= 0.015


@pytest.mark.parametrize(
    "grid", [INT8_CHANNEL, FP8_CHANNEL, IntegerGrid(4, 8), IntegerGrid(4, 8, symmetric=False)], ids=str
)
def test_scales_of_rows_are_invariant_to_a_scale_of_rows(grid: Grid) -> None:
    """Why no scheme scales queries against keys (F6): it rescales rows, and each row has scales of its own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    factor = torch.exp2(torch.randint(-3, 4, (6, 1), generator=generator).double())
    assert torch.equal(grid.nearest(weight * factor), grid.nearest(weight) * factor)
