"""MNIST's original files as training images, and generated stand-ins for a run without files."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stepfold.loop.errors import UsageError

SIDE = 28
PADDING = 2  # 28 -> 32, so that patches of 4 tile the image
CLASSES = 10
UBYTE = 0x08  # the idx code of unsigned bytes
SOURCE = "The four files are at https://yann.lecun.com/exdb/mnist and its mirrors."


@dataclass(frozen=True)
class Digits:
    """Images uint8 [samples, 28, 28] and their classes int64 [samples]."""

    images: np.ndarray
    labels: np.ndarray

    def first(self, count: int | None) -> Digits:
        """The first so many of them, or all."""
        return Digits(self.images[:count], self.labels[:count])

    def latents(self, index: np.ndarray) -> np.ndarray:
        """Images float32 [B, 1, 32, 32] in [-1, 1], padded with black, at `index` int64 [B]."""
        padded = np.pad(self.images[index], ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
        return (padded.astype(np.float32) / 127.5 - 1.0)[:, None]


def read_mnist(folder: Path, part: str) -> Digits:
    """Read one part of MNIST from its gzip-compressed idx files.

    Args:
        folder: holds `{part}-images-idx3-ubyte.gz` and `{part}-labels-idx1-ubyte.gz`.
        part: `train` or `t10k`.

    Raises:
        UsageError: a file is missing, damaged, or does not hold what its name says.
    """
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    if images.shape[1:] != (SIDE, SIDE) or len(images) == 0:
        raise UsageError(f"{folder}: expected images of {SIDE}x{SIDE} in {part}; received {list(images.shape)}.")
    if len(images) != len(labels):
        raise UsageError(
            f"{folder}: expected one label for each image of {part}; received {len(images)} images and {len(labels)} "
            f"labels. {SOURCE}"
        )
    if labels.max() >= CLASSES:
        raise UsageError(f"{folder}: expected labels 0 to {CLASSES - 1} in {part}; received {labels.max()}. {SOURCE}")
    return Digits(images, labels.astype(np.int64))


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read one gzip-compressed idx file of unsigned bytes with this number of dimensions.

    Raises:
        UsageError: the file is missing, is not gzip, or its header does not fit its content.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"{path}: no such file; --data expects the folder of MNIST's original files. {SOURCE}"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: expected a gzip-compressed idx file; received: {error}. Fetch it again.") from None
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, UBYTE, dimensions])
    if len(content) < header or content[:4] != magic:
        raise UsageError(
            f"{path}: expected an idx file of bytes with {dimensions} dimensions (it begins {magic.hex()}); "
            f"received one that begins {content[:4].hex() or 'nowhere'}. Fetch it again."
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected = int(np.prod(shape, dtype=object))
    if len(content) - header != expected:
        raise UsageError(
            f"{path}: its header announces {expected} bytes for {list(shape)}; received {len(content) - header}. "
            "Fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def generated(samples: int, seed: int) -> Digits:
    """Stand-ins for digits: one bright spot, its place on a circle told by the class, its size drawn.

    Args:
        samples: how many.
        seed: of the spots' sizes; the same seed gives the same images.
    """
    labels = np.arange(samples, dtype=np.int64) % CLASSES
    angle = 2 * np.pi * labels / CLASSES
    center = SIDE / 2 + 7 * np.stack([np.sin(angle), np.cos(angle)])  # [2, samples]
    radius = np.random.default_rng(seed).uniform(2.0, 4.0, samples)
    rows, columns = np.mgrid[:SIDE, :SIDE][:, None] - center[:, :, None, None]  # each [samples, 28, 28]
    spots = np.exp(-(rows**2 + columns**2) / (2 * radius[:, None, None] ** 2))
    return Digits((255 * spots).astype(np.uint8), labels)
