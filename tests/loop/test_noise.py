"""Noise is NumPy's documented formula, and the three sets are streams of their own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stepfold.loop.noise import SETS, SampleSet, noise

LATENT = (1, 8, 8)


@pytest.mark.parametrize("seed", [0, 2, 12345])
def test_noise_of_a_seed_is_the_documented_formula(seed: int) -> None:
    received = noise(seed, (3, *LATENT))
    expected = np.random.default_rng(seed).standard_normal((3, *LATENT)).astype("float32")
    assert received.dtype == np.float32
    np.testing.assert_array_equal(received, expected)


def test_a_smaller_count_is_the_beginning_of_a_larger_one() -> None:
    np.testing.assert_array_equal(noise(7, (2, *LATENT)), noise(7, (5, *LATENT))[:2])
    few, many = (SampleSet("validation", 7, count).noise(LATENT) for count in (2, 5))
    np.testing.assert_array_equal(few, many[:2])


def test_sets_are_reproducible_from_the_recorded_entropy() -> None:
    chosen = SampleSet("held-out", 2, 4)
    np.testing.assert_array_equal(chosen.noise(LATENT), noise(chosen.entropy, (4, *LATENT)))
    assert chosen.noise(LATENT).shape == (4, *LATENT)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_sets_are_disjoint_streams(seed: int) -> None:
    """No sample of one set is in another, in the noise of the seed itself, or correlated with one."""
    streams = [SampleSet(name, seed, 32).noise(LATENT) for name in SETS] + [noise(seed, (32, *LATENT))]
    for first, second in itertools.combinations(streams, 2):
        assert not set(map(bytes, first)) & set(map(bytes, second))
        correlation = first.reshape(32, -1) @ second.reshape(32, -1).T / 64
        assert np.abs(correlation).max() < 0.75  # 1 for equal samples; 1/8 is the standard deviation of chance


def test_sets_of_neighbouring_seeds_differ() -> None:
    keys = [tuple(SampleSet(name, seed, 1).entropy) for name in SETS for seed in range(5)]
    assert len(set(keys)) == len(keys)
    samples = {SampleSet(name, seed, 1).noise(LATENT).tobytes() for name in SETS for seed in range(5)}
    assert len(samples) == len(keys)
