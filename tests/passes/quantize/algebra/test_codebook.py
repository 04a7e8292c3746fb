"""Vector quantization without gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization_fixtures import mean_gram, vq

from stepfold.loop.errors import UsageError
from stepfold.passes.quantize.algebra.clipping import clipped_scales
from stepfold.passes.quantize.algebra.codebook import CodedWeight, encode, fit_codes, learn_codebook
from stepfold.passes.quantize.algebra.errors import drift, output_error
from stepfold.passes.quantize.algebra.grids import IntegerGrid

UNIFORM = IntegerGrid(2, 128, symmetric=False)


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, Gram and test inputs of the fixture in float32, as passes have them."""
    fixture = vq()
    return fixture.weight.float(), mean_gram(fixture.train), fixture.test.float()


def small(seed: int = 0, N: int = 16, M: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, M, generator=generator, dtype=torch.float64).cumsum(1)
    return torch.randn(N, M, generator=generator, dtype=torch.float64), mean_gram(x)


@pytest.mark.slow
def test_2_bits(layer: tuple[torch.Tensor, ...]) -> None:
    """Codebook against uniform 2 bits with clipped ranges; candidates by output error against distance."""
    weight, gram, test = layer

    def held_out(approximation: torch.Tensor) -> float:
        return drift(test @ approximation.T, test @ weight.T)

    uniform = held_out(UNIFORM.round(weight, clipped_scales(weight, UNIFORM, lowest=0.2, steps=40)))
    coded = learn_codebook(weight)
    fitted = fit_codes(weight, coded, gram)
    assert 0.35 < uniform < 0.40  # the fixture is the one the gates were set on: 0.372
    assert held_out(coded.weight) <= 0.90 * uniform  # measured 0.86
    assert held_out(fitted.weight) <= 0.80 * held_out(coded.weight)  # measured 0.68
    changed = float((fitted.indices != coded.indices).double().mean())
    assert 0.2 < changed < 0.5  # measured 0.33
    assert coded.bits_per_weight == pytest.approx(2 + 32 * (256 * 4 + 1152) / 1152**2)


# -- k-means


def test_few_distinct_runs_are_met_exactly() -> None:
    """Four distinct runs, one of them nearly everywhere: centres that start without runs move to the rare ones."""
    runs = torch.zeros(4, 64, 2, dtype=torch.float64)
    runs[..., 0] = 1  # every row has the largest magnitude 1
    runs[0, :3] = torch.tensor([[0.0, 1.0], [1.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)
    weight = runs.flatten(1)
    assert torch.equal(learn_codebook(weight, run=2, codewords=4).weight, weight)


def test_rows_have_their_scales() -> None:
    weight, _ = small()
    weight[3] *= 1000
    weight[5] = 0
    coded = learn_codebook(weight, run=2, codewords=32)
    assert coded.scale[3] == weight[3].abs().max() and coded.scale[5] == 1
    assert coded.indices.dtype == torch.uint8 and coded.indices.shape == (16, 16)
    plain = learn_codebook(small()[0], run=2, codewords=32)
    assert drift(coded.weight[3], weight[3]) < 3 * drift(plain.weight[3], small()[0][3])


def test_more_codewords_are_better() -> None:
    weight, _ = small(N=64, M=64)
    errors = [drift(learn_codebook(weight, run=2, codewords=count).weight, weight) for count in (1, 4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2


def test_it_follows_its_seed() -> None:
    weight, _ = small()
    first, second, other = (learn_codebook(weight, 2, 16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.indices, second.indices) and torch.equal(first.codebook, second.codebook)
    assert not torch.equal(first.codebook, other.codebook)


# -- codes


@given(st.integers(0, 1000), st.sampled_from([(1, 16), (2, 64), (4, 8)]), st.booleans())
def test_encoding_what_codes_decode_to_is_exact(seed: int, sizes: tuple[int, int], fitted: bool) -> None:
    weight, gram = small(seed)
    coded = learn_codebook(weight.float(), *sizes, iterations=5)
    coded = fit_codes(weight.float(), coded, gram) if fitted else coded
    again = encode(coded.weight, coded.codebook, coded.scale)
    assert torch.equal(again.weight, coded.weight)


@given(st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_fitting_is_never_worse(seed: int, candidates: int, white: bool) -> None:
    weight, gram = small(seed)
    gram = torch.eye(32, dtype=torch.float64) if white else gram
    coded = learn_codebook(weight, 4, 16, iterations=3)
    fitted = fit_codes(weight, coded, gram, candidates)
    assert output_error(fitted.weight - weight, gram) <= output_error(coded.weight - weight, gram)


def test_a_code_that_cannot_be_improved_stays() -> None:
    weight, gram = small()
    coded = learn_codebook(weight, 4, 16)
    exact = coded.weight
    assert fit_codes(exact, coded, gram) is coded


def test_codewords_become_the_means_of_their_runs() -> None:
    """With the identity as Gram and equal row scales that is the least-squares codebook."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.sign(torch.randn(16, 16, 1, generator=generator, dtype=torch.float64))
    weight = (5 * signs + torch.randn(16, 16, 2, generator=generator, dtype=torch.float64)).flatten(1)
    codebook = torch.tensor([[4.0, 4.0], [-4.0, -4.0]], dtype=torch.float64)
    coded = encode(weight, codebook, torch.ones(16, dtype=torch.float64))
    fitted = fit_codes(weight, coded, torch.eye(32, dtype=torch.float64), candidates=2)
    runs, first = weight.reshape(-1, 2), signs.flatten() > 0
    torch.testing.assert_close(fitted.codebook, torch.stack([runs[first].mean(0), runs[~first].mean(0)]))


def test_no_small_change_of_the_codebook_is_better() -> None:
    weight, gram = small()
    before = learn_codebook(weight, 4, 8)
    after = fit_codes(weight, before, gram)

    def slope(coded: CodedWeight) -> float:
        codebook = coded.codebook.clone().requires_grad_()
        difference = replace(coded, codebook=codebook).weight - weight
        ((difference @ gram) * difference).sum().backward()
        return float(torch.as_tensor(codebook.grad).norm())

    assert slope(after) < 0.01 * slope(before)


# -- what is refused


def test_errors() -> None:
    weight, gram = small()
    with pytest.raises(UsageError, match=r"run: expected a divisor of the 32 input features; received 5\. Try 4"):
        learn_codebook(weight, run=5)
    with pytest.raises(UsageError, match=r"codewords: expected 1 to 32 for a weight of 16 x 32; received 33"):
        learn_codebook(weight, run=4, codewords=33)
    with pytest.raises(UsageError, match=r"codewords: expected 1 to 256 for a weight of 256 x 64; received 257"):
        learn_codebook(torch.ones(256, 64), run=4, codewords=257)
    coded = learn_codebook(weight, 4, 4)
    with pytest.raises(UsageError, match=r"fc1: expected a Gram of shape \(32, 32\); received \(4, 4\)"):
        fit_codes(weight, coded, torch.eye(4), site="fc1")
    for candidates in (0, 5):
        with pytest.raises(
            UsageError, match=rf"fc1: candidates: expected 1 to 4, the codewords; received {candidates}"
        ):
            fit_codes(weight, coded, gram, candidates, site="fc1")
