"""The polynomial through earlier outputs, in the grid call: what block caches do without calibration."""

from __future__ import annotations

import numpy as np

from ....loop.recurrence import Array
from .method import Method, Seen


class Repeat(Method):
    """The newest output again."""

    name = "repeat"
    source = "FORA (arXiv 2407.01425), Delta-DiT (arXiv 2406.01125), DeepCache (arXiv 2312.00858)"
    reach = 1

    def weights(self, seen: Seen) -> Array:
        """A weight of one."""
        return lagrange(seen.call, seen.anchors)


class Forecast(Repeat):
    """The straight line through the two newest outputs."""

    name = "forecast"
    source = "TaylorSeer (arXiv 2503.06923), order 1"
    reach = 2


def lagrange(call: int, anchors: Array) -> Array:
    """The weights [m] that carry values at the anchors [m] on to a call, by the polynomial through them."""
    others = [np.delete(anchors, i) for i in range(len(anchors))]
    return np.asarray([np.prod((call - rest) / (one - rest)) for one, rest in zip(anchors, others, strict=True)])
