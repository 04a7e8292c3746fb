"""Images as pipelines return them, and how equal two sets of them are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ir.program import Program
from ..loop.metrics import range_psnr

Array = np.ndarray
LEAST_DB = 60.0
"""Of a float32 program: rounding leaves more than 100 in a loop of 50 steps, a wrong fold less than 40."""


def pipeline_images(answer: Any) -> Array:
    """Images [B, C, H, W] or frames [B, C, F, H, W] in [0, 1] of what a pipeline returns as NumPy arrays."""
    images = answer[0] if isinstance(answer, tuple) else next(iter(answer.values()))
    return np.moveaxis(np.asarray(images, np.float32), -1, 1)


def unit_images(decoder: Program, latents: Array) -> Array:
    """Images in [0, 1] of latents [B, *latent], in one batch and rounded as those of a pipeline are."""
    image = decoder.bind().evaluate({decoder.inputs[0].name: latents.astype(np.float32)})[0]
    return image * np.float32(0.5) + np.float32(0.5)


def worst(got: Array, wanted: Array) -> float:
    """PSNR of the worst sample in dB; 0 where the shapes differ, so that nothing can be compared."""
    return float(range_psnr(got, wanted).min()) if got.shape == wanted.shape else 0.0
