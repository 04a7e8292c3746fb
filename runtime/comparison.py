"""Samples beside their reference: the PSNR of each, and the few that a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Comparison:
    """Samples of a compiled program against those of the full loop.

    Attributes:
        psnr: [B] PSNR of each in dB.
        samples: [shown, ...] first of them.
        reference: [shown, ...] first of the full loop's.
        worst: [2, ...] the reference of the sample of least PSNR, and that sample.
    """

    psnr: Array
    samples: Array
    reference: Array
    worst: Array

    @classmethod
    def of(cls, samples: Array, reference: Array, psnr: Array, shown: int) -> Comparison:
        """Keep of samples [B, ...] and their reference what a report shows."""
        i = int(psnr.argmin())
        return cls(psnr, samples[:shown].copy(), reference[:shown].copy(), np.stack([reference[i], samples[i]]))


@dataclass(frozen=True, eq=False)
class Pictures:
    """Samples that a report shows, by the name of what made them.

    Attributes:
        first: [shown, ...] first samples; those of the full loop are called `reference`.
        worst: [2, ...] sample of least PSNR, behind its reference.
    """

    first: Mapping[str, Array] = field(default_factory=dict)
    worst: Mapping[str, Array] = field(default_factory=dict)


def join(parts: Sequence[Comparison]) -> Comparison:
    """The comparison of all samples of several."""
    return Comparison(
        np.concatenate([part.psnr for part in parts]),
        np.concatenate([part.samples for part in parts]),
        np.concatenate([part.reference for part in parts]),
        min(parts, key=lambda part: part.psnr.min()).worst,
    )
