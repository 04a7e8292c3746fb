"""Weights of earlier outputs by least squares, in the closed loop."""

from __future__ import annotations

import numpy as np

from ....loop.recurrence import Array
from .method import Method, Seen

RIDGE = 1e-6
"""Relative to the mean square of the anchors; pulls towards the newest output alone."""


class Fitted(Method):
    """The weights with which earlier outputs come closest to what the slot would compute.

    One anchor gives the magnitude that MagCache corrects by hand, two give the slope of TaylorSeer where there is one and
    less of it where there is noise.
    """

    name = "fitted"
    source = "stepfold; orders of TaylorSeer (arXiv 2503.06923) and magnitudes of MagCache (arXiv 2506.09045) as least squares"
    reach = 3

    def weights(self, seen: Seen) -> Array:
        """Ridge least squares around the newest output."""
        normal = seen.normal()
        newest = np.eye(len(seen.anchors))[-1]
        if not (np.isfinite(normal.gram).all() and np.isfinite(normal.right).all()):
            return newest  # the trajectory has left the range of numbers; nothing can be learned from it
        scale = np.sqrt(np.maximum(np.diag(normal.gram), 1e-30))
        normalized = normal.gram / np.outer(scale, scale)
        residual = normal.right / scale - normalized @ (newest * scale)
        return newest + np.linalg.solve(normalized + RIDGE * np.eye(len(scale)), residual) / scale
