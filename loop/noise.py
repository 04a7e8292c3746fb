"""Seeded noise and the three disjoint sets of samples.

The noise of a seed is the same everywhere: NumPy's default generator, standard normal in float64, rounded to float32.
Where a sampler draws noise on its way, a sample has its start first and then the draws in their order (`noise_shape` of
the loop), so that all noise of a request is known before it begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
SETS = ("calibration", "validation", "held-out")


def noise(seed: int | list[int], shape: tuple[int, ...]) -> Array:
    """Standard normal noise of a seed: float32 of `shape` [B, ...]."""
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@dataclass(frozen=True)
class SampleSet:
    """One of the three sets: *calibration* fits, *validation* chooses, *held-out* is only reported.

    A set draws from the seed sequence `[seed, index of the set]`, so the sets are independent streams of one seed.
    """

    name: str
    seed: int
    count: int

    @property
    def entropy(self) -> list[int]:
        """The seed sequence of this set's generator, recorded in the manifest."""
        return [self.seed, SETS.index(self.name) + 1]

    def noise(self, shape: tuple[int, ...]) -> Array:
        """[count, *shape] float32, for the noise of one sample of this shape."""
        return noise(self.entropy, (self.count, *shape))
