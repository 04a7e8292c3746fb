"""Synthetic layers whose quantization errors are known: the same draws in every test that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from stepfold.passes.quantize.algebra.data_free import Pair

DTYPE = torch.float64
GROUP = 64
"""Input channels that share a scale in the tests of `outlier`."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer without bias: weight [N, M], inputs [T, M] to calibrate and [T', M] to test with."""

    weight: torch.Tensor
    train: torch.Tensor
    test: torch.Tensor


class Draws:
    """Standard normal and other draws of one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=DTYPE)

    def some(self, count: int, total: int) -> torch.Tensor:
        """`count` distinct numbers below `total`."""
        return torch.randperm(total, generator=self.generator)[:count]

    def mixing(self, width: int, first: float, last: float) -> torch.Tensor:
        """[width, width] random, rows scaled by exp(linspace(first, last)): features that depend on each other."""
        spectrum = torch.exp(torch.linspace(first, last, width, dtype=DTYPE))
        return self.normal(width, width) / width**0.5 * spectrum[:, None]


@cache
def outlier(seed: int = 0) -> Layer:
    """OUTLIER: correlated inputs, six channels 25 times as large, a weight with a rank-8 part and 60 large entries."""
    draws, M, N, T = Draws(seed), 512, 512, 4096
    inputs = draws.normal(T + 2048, M) @ draws.mixing(M, 1, -2.5)
    inputs = inputs / inputs.std() * torch.exp(0.6 * draws.normal(M))
    inputs[:, draws.some(6, M)] *= 25
    weight = 0.02 * draws.normal(N, M) + 0.006 * draws.normal(N, 8) @ draws.normal(8, M)
    weight.view(-1)[draws.some(60, N * M)] = 0.25 * torch.sign(draws.normal(60))
    return Layer(weight, inputs[:T], inputs[T:])


@cache
def vq(seed: int = 0) -> Layer:
    """VQ: 1152 x 1152 with a rank-16 part, correlated inputs."""
    draws, M, T = Draws(seed), 1152, 4096
    inputs = draws.normal(T + 2048, M) @ draws.mixing(M, 1, -2)
    weight = 0.02 * draws.normal(M, M) + 0.003 * draws.normal(M, 16) @ draws.normal(16, M)
    return Layer(weight, inputs[:T], inputs[T:])


@dataclass(frozen=True, eq=False)
class FeedForward:
    """A feed-forward pair with inputs [T, D] to calibrate and [T', D] to test with."""

    pair: Pair
    train: torch.Tensor
    test: torch.Tensor


def gelu(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(values, approximate="tanh")


@cache
def ffn256(seed: int = 0) -> FeedForward:
    """FFN256: normalized correlated inputs, every fourth hidden unit mostly a copy of the one before it."""
    draws, D, hidden, T = Draws(seed), 256, 1024, 8192
    inputs = torch.nn.functional.layer_norm(draws.normal(T + 4096, D) @ draws.mixing(D, 1, -2), (D,))
    first = 0.06 * draws.normal(hidden, D)
    first[1::4] = 0.7 * first[0::4] + 0.5 * first[1::4]
    first_bias = 0.3 * draws.normal(hidden) - 0.3
    second = 0.05 * draws.normal(D, hidden) * torch.exp(0.5 * draws.normal(hidden))
    pair = Pair(first, first_bias, second, torch.zeros(D, dtype=DTYPE), gelu)
    return FeedForward(pair, inputs[:T], inputs[T:])


def mean_gram(tokens: torch.Tensor) -> torch.Tensor:
    """[M, M] float64: the mean of x x^T over tokens [T, M]."""
    rows = tokens.to(torch.float64)
    return rows.T @ rows / rows.shape[0]
