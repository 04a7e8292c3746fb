"""Images of latents: those of a bundle against those of the pipeline it was made from, a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..loop.metrics import psnr
from ..loop.ports import BoundProgram
from .comparison import Comparison, join

Array = np.ndarray

VALUES = 1 << 13
"""Numbers of latents that are decoded at once: a decoder needs gigabytes for an image of 1024 x 1024 pixels."""


@dataclass(frozen=True)
class Decoding:
    """The decoder of a pipeline, which makes images in [-1, 1] of latents, twice.

    Attributes:
        original: opens the decoder as it was captured.
        compiled: opens the decoder of the bundle.
        progress: called with (images done, images in all).
    """

    original: Callable[[], BoundProgram]
    compiled: Callable[[], BoundProgram]
    progress: Callable[[int, int], None]

    def psnr(self, latents: Array, reference: Array) -> Array:
        """PSNR in dB [B] of the images of a program's latents [B, ...] against those of the full loop [B, ...]."""
        return self.compared(latents, reference, 0).psnr

    def compared(self, latents: Array, reference: Array, shown: int) -> Comparison:
        """Images compared; never more than a batch of them is held beside those that are shown.

        Args:
            latents: [B, *latent] of the compiled program, for the decoder of the bundle.
            reference: [B, *latent] of the full loop, for the original one.
            shown: number of images that are kept.
        """
        compiled, original = self.compiled(), self.original()
        size, parts = max(1, VALUES // latents[0].size), list[Comparison]()
        for start in range(0, len(latents), size):
            rows = slice(start, start + size)
            images, wanted = _decoded(compiled, latents[rows]), _decoded(original, reference[rows])
            parts.append(Comparison.of(images, wanted, psnr(images, wanted), max(0, shown - start)))
            self.progress(min(start + size, len(latents)), len(latents))
        return join(parts)


def _decoded(decoder: BoundProgram, latents: Array) -> Array:
    return decoder.evaluate({decoder.inputs[0].name: latents.astype(np.float32)})[0]
