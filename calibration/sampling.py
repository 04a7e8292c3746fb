"""Seeded choices of rows, the same however samples are cut into shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

TOKENS = 512
"""Most rows of one sample and evaluation that enter a Gram matrix."""
ROWS = 512
"""Most raw rows of one value."""


@dataclass(frozen=True)
class Draws:
    """Which raw rows are kept, of every value alike.

    Attributes:
        places: (call, branch) -> samples, each with places in its tokens from 0 to 1.
    """

    places: Mapping[tuple[int, int], Sequence[tuple[int, float]]]

    def count(self, first: int, stop: int) -> int:
        """How many places lie in samples first to stop."""
        return sum(first <= sample < stop for chosen in self.places.values() for sample, _ in chosen)

    def rows(self, values: torch.Tensor, call: int, branch: int, first: int) -> torch.Tensor:
        """The chosen rows [rows, M] of values [B, T, M], whose first sample is number `first`."""
        samples, tokens = values.shape[:2]
        chosen = [
            (sample - first, int(place * tokens))
            for sample, place in self.places.get((call, branch), ())
            if first <= sample < first + samples
        ]
        index = torch.tensor(sorted(set(chosen)), dtype=torch.int64).reshape(-1, 2)
        return values[index[:, 0], index[:, 1]]


def draw_rows(seed: int, samples: int, evaluations: int, branches: int) -> Draws:
    """At most `ROWS` places, spread over samples, calls and branches without preference."""
    generator = np.random.default_rng([seed, ROWS])
    cells = samples * evaluations * branches
    chosen = np.sort(generator.permutation(cells)[:ROWS])
    each = max(1, ROWS // cells)
    places: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
    for cell in chosen:
        sample, rest = divmod(int(cell), evaluations * branches)
        at = divmod(rest, branches)
        places[at] += [(sample, float(place)) for place in (np.arange(each) + generator.random(each)) / each]
    return Draws(dict(places))


def gram_tokens(
    values: torch.Tensor, seed: int, at: tuple[int, int, int, int], most: int | None = None
) -> torch.Tensor:
    """At most so many rows of each sample, for a Gram matrix.

    Args:
        values: [B, T, M].
        seed: seed of the run.
        at: site, branch, call, and the number of the first sample.
        most: rows of a sample; `TOKENS` by default.

    Returns:
        [rows, M]; all rows where there are few.
    """
    samples, tokens, width = values.shape
    most = TOKENS if most is None else most
    if tokens <= most:
        return values.reshape(-1, width)
    site, branch, call, first = at
    chosen = [
        np.sort(np.random.default_rng([seed, site, branch, call, first + i]).permutation(tokens)[:most])
        for i in range(samples)
    ]
    index = torch.from_numpy(np.stack(chosen))
    return values.gather(1, index[:, :, None].expand(-1, -1, width)).reshape(-1, width)
