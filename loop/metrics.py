"""How close two sets of samples are: PSNR, SSIM and drift."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .spec import Values

Array = np.ndarray
DATA_RANGE = (-1.0, 1.0)
SMALLEST_MSE = 1e-12  # so that equal samples read 126 dB instead of infinity


def psnr(samples: Array, reference: Array) -> Array:
    """PSNR in dB of each sample, both clipped to [-1, 1], peak 2.

    Args:
        samples: [B, ...].
        reference: [B, ...].

    Returns:
        [B] `10 log10(4 / mse)` with mse at least 1e-12; 0 for a sample that is not a number.
    """
    difference = np.clip(samples, *DATA_RANGE).astype(np.float64) - np.clip(reference, *DATA_RANGE)
    mse = np.maximum((difference**2).reshape(len(samples), -1).mean(axis=1), SMALLEST_MSE)
    return 10.0 * np.log10(4.0 / np.nan_to_num(mse, nan=4.0))


def range_psnr(samples: Array, reference: Array) -> Array:
    """PSNR in dB of each sample, its peak the range of the reference: for latents, which have no range of their own.

    Args:
        samples: [B, ...].
        reference: [B, ...].

    Returns:
        [B] `10 log10(range^2 / mse)`, at most that of equal samples in `psnr`; 0 where a sample is not a number.
    """
    rows, wanted = (value.astype(np.float64).reshape(len(value), -1) for value in (samples, reference))
    peak = np.maximum(wanted.max(axis=1) - wanted.min(axis=1), np.finfo(np.float32).tiny)
    relative = ((rows - wanted) ** 2).mean(axis=1) / peak**2
    return -10.0 * np.log10(np.nan_to_num(np.maximum(relative, SMALLEST_MSE / 4.0), nan=1.0))


def sample_psnr(kind: Values) -> Callable[[Array, Array], Array]:
    """The PSNR that fits what samples are: `psnr` of pixels, `range_psnr` of latents."""
    return psnr if kind == "pixels" else range_psnr


def drift(values: Array, reference: Array) -> float:
    """Relative L2 error of `values` against `reference`."""
    scale = float(np.linalg.norm(reference.astype(np.float64)))
    error = float(np.linalg.norm(values.astype(np.float64) - reference))
    return error / scale if scale > 0 else error


def lower_bound(values: Array) -> float:
    """The lower 95 % confidence bound of the mean (one-sided, normal)."""
    if len(values) < 2:
        return float(values.mean())
    return float(values.mean() - 1.645 * values.std(ddof=1) / np.sqrt(len(values)))


def ssim(samples: Array, reference: Array, window: int = 7) -> Array:
    """Mean structural similarity of each sample over channels (Wang et al. 2004, uniform window, peak 2).

    Args:
        samples: [B, C, H, W].
        reference: [B, C, H, W].
        window: side of the square window, clipped to the image.

    Returns:
        [B].
    """
    x = np.clip(samples, *DATA_RANGE).astype(np.float64)
    y = np.clip(reference, *DATA_RANGE).astype(np.float64)
    side = min(window, *x.shape[-2:])
    count = side * side

    def mean(values: Array) -> Array:
        windows = np.lib.stride_tricks.sliding_window_view(values, (side, side), axis=(-2, -1))
        return windows.mean(axis=(-2, -1))

    mean_x, mean_y = mean(x), mean(y)
    unbias = count / max(count - 1, 1)
    var_x = (mean(x * x) - mean_x**2) * unbias
    var_y = (mean(y * y) - mean_y**2) * unbias
    covariance = (mean(x * y) - mean_x * mean_y) * unbias
    c1, c2 = (0.01 * 2.0) ** 2, (0.03 * 2.0) ** 2
    score = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.reshape(len(samples), -1).mean(axis=1)
