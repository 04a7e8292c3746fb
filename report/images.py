"""Samples as pictures: one PNG file for `generate`, data URIs for the page."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

import numpy as np

from ..loop.errors import StepfoldError
from ..loop.writing import replacing

Array = np.ndarray
SMALLEST_SIDE = 96  # pixels; smaller samples are enlarged without smoothing
GAP = 2  # pixels between the samples of a grid, before enlarging
CHANNELS = (1, 3)
VIDEO_DIMENSIONS = 5  # samples, channels, frames, height, width


def to_pixels(samples: Array) -> Array:
    """Samples [B, C, H, W] in [-1, 1] as pixels [B, H, W, C], uint8.

    Raises:
        StepfoldError: they are no images of one or three channels.
    """
    if samples.ndim != 4 or samples.shape[1] not in CHANNELS:
        raise StepfoldError(
            f"image: expected samples [B, 1 or 3, H, W]; received {list(samples.shape)}. Latents of a model with a "
            "decoder are no images: save the numbers instead (--npy FILE.npy)."
        )
    levels = np.rint((np.clip(np.nan_to_num(samples), -1.0, 1.0) + 1.0) * 127.5)
    return levels.astype(np.uint8).transpose(0, 2, 3, 1)


def is_image(samples: Array) -> bool:
    """Whether the samples can be drawn."""
    return samples.ndim == 4 and samples.shape[1] in CHANNELS


def grid_png(samples: Array, columns: int | None = None, transparent: bool = False) -> bytes:
    """Draw samples [B, C, H, W] in rows, first to last, as a PNG.

    Args:
        samples: samples in [-1, 1], of one or three channels.
        columns: samples in a row; None makes the grid about square, one row for up to ten.
        transparent: leave the gaps between samples out, for a page that may be dark; else they are white.

    Raises:
        StepfoldError: they are no images.
    """
    from PIL import Image

    pixels = to_pixels(samples)
    B, H, W, C = pixels.shape
    wide = columns or (B if B <= 10 else math.ceil(math.sqrt(B)))
    rows = math.ceil(B / wide)
    canvas = np.full((rows * (H + GAP) - GAP, wide * (W + GAP) - GAP, C + transparent), 255, np.uint8)
    canvas[:, :, C:] = 0
    for i, image in enumerate(pixels):
        top, left = (i // wide) * (H + GAP), (i % wide) * (W + GAP)
        canvas[top : top + H, left : left + W, :C] = image
        canvas[top : top + H, left : left + W, C:] = 255
    factor = math.ceil(SMALLEST_SIDE / min(H, W)) if min(H, W) < SMALLEST_SIDE else 1
    picture = Image.fromarray(canvas.squeeze(2) if canvas.shape[2] == 1 else canvas)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def write_grid(path: Path, samples: Array, columns: int | None = None) -> None:
    """Write `grid_png` to a file, in one step; raises as `grid_png` does."""
    data = grid_png(samples, columns)
    with replacing(path) as stream:
        stream.write(data)


def write_pictures(path: Path, samples: Array) -> list[Path]:
    """Write images as one file, and videos as one file for each frame: `name-0001.png` and on, beside `path`.

    Args:
        path: file of the images; a number is put behind its name for each frame.
        samples: [B, C, H, W], or [B, C, F, H, W] of videos, in [-1, 1].

    Returns:
        The files, in order.

    Raises:
        StepfoldError: they are neither.
    """
    if samples.ndim != VIDEO_DIMENSIONS:
        write_grid(path, samples)
        return [path]
    files = [path.with_stem(f"{path.stem}-{number:04d}") for number in range(1, samples.shape[2] + 1)]
    for file, frame in zip(files, np.moveaxis(samples, 2, 0), strict=True):
        write_grid(file, frame)
    return files


def data_uri(samples: Array, columns: int | None = None) -> str:
    """`grid_png` as a `data:` URI, for a page that loads nothing."""
    return "data:image/png;base64," + base64.b64encode(grid_png(samples, columns, transparent=True)).decode("ascii")
