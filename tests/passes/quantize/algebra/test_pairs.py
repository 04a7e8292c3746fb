"""Codes whose pairs no processor saturates: by hand, after every way of rounding, and multiplied as such a processor does."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stepfold.ir.pairs import LARGEST_SUM, pair_sums, saturates
from stepfold.passes.quantize.algebra.clipping import clipped_scales
from stepfold.passes.quantize.algebra.gptq import gptq
from stepfold.passes.quantize.algebra.grids import INT8_CHANNEL, Quantized
from stepfold.passes.quantize.algebra.svdquant import SvdquantSettings, svdquant

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 33))
WEIGHTS = hnp.arrays(np.float32, SHAPES, elements=st.floats(-8, 8, width=16)).map(torch.from_numpy)


def saturating(q: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """u8 [T, M] times s8 [N, M] as without VNNI: products of neighbours are added in 16 bits that saturate."""
    q, codes = (np.pad(part, ((0, 0), (0, part.shape[1] % 2))).astype(np.int32) for part in (q, codes))
    products = q[:, None] * codes[None]
    return np.clip(products[..., 0::2] + products[..., 1::2], -(2**15), 2**15 - 1).sum(axis=-1)


def exact(q: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return q.astype(np.int32) @ codes.astype(np.int32).T


def shares(weight: torch.Tensor) -> torch.Tensor:
    """A Gram whose neighbours go together, so that GPTQ moves much from one to the next."""
    M = weight.shape[1]
    return 0.9 * torch.ones(M, M, dtype=torch.float64) + 0.1 * torch.diag(torch.linspace(1, 3, M, dtype=torch.float64))


def by_gptq(weight: torch.Tensor) -> Quantized:
    return gptq(weight, shares(weight), INT8_CHANNEL).quantized


def by_clipped_gptq(weight: torch.Tensor) -> Quantized:
    scales = clipped_scales(weight, INT8_CHANNEL, shares(weight).float())
    return gptq(weight, shares(weight), INT8_CHANNEL, scales).quantized


def by_shrunken_scales(weight: torch.Tensor) -> Quantized:
    return Quantized.of(weight, INT8_CHANNEL, INT8_CHANNEL.scales(weight, 0.4))


def beside_a_branch(weight: torch.Tensor) -> Quantized:
    tokens = torch.linspace(-1, 1, 4 * weight.shape[1]).reshape(4, -1)
    settings = SvdquantSettings(INT8_CHANNEL, rank=1, steps=2, iterations=2, clip=True)
    return svdquant(weight, tokens, settings, gram=shares(weight)).residual


WAYS = [
    lambda weight: Quantized.of(weight, INT8_CHANNEL),
    by_shrunken_scales,
    by_gptq,
    by_clipped_gptq,
    beside_a_branch,
]


def test_by_hand() -> None:
    """A row scales to its largest magnitude or to its largest pair, over 127; halves round to even."""
    weight = torch.tensor([[127.0, -63.5, 0.5], [0.0, 0.0, 0.0], [100.0, 154.0, -254.0], [-0.5, 0.25, 0.125]])
    rounded = Quantized.of(weight, INT8_CHANNEL)
    assert rounded.scales.scale[:, 0].tolist() == pytest.approx([1.0, 1.0, 2.0, 0.5 / 127])
    assert rounded.codes.tolist() == [[127, -64, 0], [0, 0, 0], [50, 77, -127], [-127, 64, 32]]
    assert pair_sums(rounded.codes).tolist() == [[127, 0], [0, 0], [127, 127], [127, 32]]


def test_a_pair_that_is_not_covered_gives_up_equal_parts() -> None:
    """At a third of the scale 100 and 127 would be clamped to 127 and 127: 126 too much, 63 from each."""
    weight = torch.tensor([[-100.0, -127.0, 127.0]])
    scales = INT8_CHANNEL.scales(weight, 1 / 3)
    assert Quantized.of(weight, INT8_CHANNEL, scales).codes.tolist() == [[-64, -64, 127]]


@pytest.mark.parametrize(
    ("pair", "beyond"), [((64, 64), False), ((64, 65), True), ((-128, -1), True), ((-127, 127), False)]
)
def test_what_saturates(pair: tuple[int, int], beyond: bool) -> None:
    """Both ways: as `saturates` says, and as 16 bits do for the largest activation."""
    codes = np.array([pair], np.int8)
    q = np.array([[255, 255], [255, 0], [0, 255]], np.uint8)
    assert saturates(torch.from_numpy(codes)) == beyond
    assert (saturating(q, codes) != exact(q, codes)).any() == beyond


@pytest.mark.parametrize("way", WAYS)
@given(weight=WEIGHTS, data=st.data())
def test_no_way_of_rounding_saturates(
    way: Callable[[torch.Tensor], Quantized], weight: torch.Tensor, data: st.DataObject
) -> None:
    codes = way(weight).codes
    assert codes.dtype == torch.int8 and int(codes.to(torch.int16).abs().max()) <= 127
    assert int(pair_sums(codes).max()) <= LARGEST_SUM and not saturates(codes)
    q = data.draw(hnp.arrays(np.uint8, (2, weight.shape[1])))
    q[0] = 255
    np.testing.assert_array_equal(saturating(q, codes.numpy()), exact(q, codes.numpy()))


@given(weight=WEIGHTS)
def test_nearest_is_half_a_step_away(weight: torch.Tensor) -> None:
    """Under scales that cover it nothing is taken from a pair, and a row does not disturb another."""
    rounded = Quantized.of(weight, INT8_CHANNEL)
    assert ((rounded.weight - weight).abs() <= 0.5001 * rounded.scales.scale).all()
    alone = Quantized.of(weight[:1], INT8_CHANNEL)
    assert torch.equal(alone.codes, rounded.codes[:1])


def test_what_follows_makes_up_for_a_neighbour_that_gave_way() -> None:
    """GPTQ with coupled pairs is better than rounding to nearest by what it reads."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    gram = shares(weight).float()
    losses = [
        float(torch.einsum("nm,mk,nk->", d, gram, d))
        for d in (by_gptq(weight).weight - weight, Quantized.of(weight, INT8_CHANNEL).weight - weight)
    ]
    assert losses[0] < 0.6 * losses[1]
