"""PSNR, SSIM, drift and the confidence bound against values worked out by hand or by plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from stepfold.loop.metrics import drift, lower_bound, psnr, range_psnr, ssim


def test_psnr_by_hand() -> None:
    reference = np.zeros((2, 1, 2, 2), np.float32)
    samples = reference.copy()
    samples[0, 0, 0, 0] = 0.5  # mse 0.25 / 4 = 1/16
    samples[1] += 0.1  # mse 0.01
    np.testing.assert_allclose(psnr(samples, reference), [10 * math.log10(64), 10 * math.log10(400)], rtol=1e-6)


def test_psnr_clips_both_to_the_data_range() -> None:
    reference = np.full((1, 1, 2, 2), 3.0, np.float32)
    np.testing.assert_allclose(psnr(np.full_like(reference, 1.5), reference), 10 * math.log10(4 / 1e-12))
    np.testing.assert_allclose(psnr(np.full_like(reference, -7.0), reference), 0.0, atol=1e-12)  # mse 4, peak 2


def test_equal_samples_read_126_db() -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, (3, 1, 4, 4)).astype("float32")
    values = psnr(samples, samples)
    np.testing.assert_allclose(values, 10 * math.log10(4 / 1e-12))
    np.testing.assert_allclose(values, 126.02, atol=0.005)


def test_psnr_is_computed_for_each_sample_and_in_double() -> None:
    reference = np.zeros((5, 3), np.float32)
    samples = np.full_like(reference, 1e-4)
    samples[2] = 1e-3
    values = psnr(samples, reference)
    assert values.shape == (5,) and values.dtype == np.float64
    assert values[2] < values[0] and math.isclose(values[0], 10 * math.log10(4e8), rel_tol=1e-6)


def test_drift_by_hand() -> None:
    assert math.isclose(drift(np.array([3.0, 4.0]), np.array([3.0, 0.0])), 4 / 3)
    assert drift(np.ones(4, np.float32), np.ones(4, np.float32)) == 0.0


def test_drift_from_nothing_is_the_error_itself() -> None:
    assert drift(np.array([3.0, 4.0]), np.zeros(2)) == 5.0


def test_lower_bound_by_hand() -> None:
    values = np.array([40.0, 42.0, 44.0])  # standard deviation 2
    assert math.isclose(lower_bound(values), 42.0 - 1.645 * 2.0 / math.sqrt(3))
    assert lower_bound(np.array([41.0])) == 41.0
    assert lower_bound(np.full(8, 40.0)) == 40.0


def test_lower_bound_rises_with_the_number_of_samples() -> None:
    values = np.random.default_rng(1).normal(40.0, 2.0, 400)
    assert lower_bound(values[:16]) < lower_bound(np.tile(values[:16], 16)) < values[:16].mean()


def test_ssim_of_equal_samples_is_one() -> None:
    samples = np.random.default_rng(2).uniform(-1, 1, (2, 1, 9, 9))
    np.testing.assert_allclose(ssim(samples, samples), 1.0)


def test_ssim_of_constant_images_by_hand() -> None:
    """Without variance only luminance counts: (2 a b + c1) / (a^2 + b^2 + c1), c1 = (0.01 * 2)^2 = 4e-4."""
    x, y = np.full((1, 1, 8, 8), 0.5), np.full((1, 1, 8, 8), 0.25)
    np.testing.assert_allclose(ssim(x, y), (2 * 0.5 * 0.25 + 4e-4) / (0.25 + 0.0625 + 4e-4))


def test_ssim_of_one_window_by_hand() -> None:
    """A 2 x 2 image is one window: means 0, variances 4/3 and 1/3, covariance 2/3, c2 = (0.03 * 2)^2 = 3.6e-3."""
    x = np.array([[1.0, -1.0], [1.0, -1.0]])[None, None]
    expected = (2 * 2 / 3 + 3.6e-3) / (4 / 3 + 1 / 3 + 3.6e-3)
    np.testing.assert_allclose(ssim(x, 0.5 * x), expected)


def ssim_by_loops(x: np.ndarray, y: np.ndarray, side: int) -> float:
    """Wang et al. 2004 for one [C, H, W] image, window by window."""
    values = []
    for c in range(x.shape[0]):
        for i in range(x.shape[1] - side + 1):
            for j in range(x.shape[2] - side + 1):
                a = x[c, i : i + side, j : j + side].ravel()
                b = y[c, i : i + side, j : j + side].ravel()
                cov = np.cov(a, b)  # unbiased
                luminance = (2 * a.mean() * b.mean() + 4e-4) / (a.mean() ** 2 + b.mean() ** 2 + 4e-4)
                values.append(luminance * (2 * cov[0, 1] + 3.6e-3) / (cov[0, 0] + cov[1, 1] + 3.6e-3))
    return float(np.mean(values))


@pytest.mark.parametrize(("window", "side"), [(7, 7), (3, 3), (99, 9)])
def test_ssim_equals_plain_loops(window: int, side: int) -> None:
    generator = np.random.default_rng(3)
    x = generator.uniform(-1, 1, (2, 3, 9, 11))
    y = np.clip(x + 0.3 * generator.standard_normal(x.shape), -1, 1)
    np.testing.assert_allclose(ssim(x, y, window), [ssim_by_loops(a, b, side) for a, b in zip(x, y, strict=True)])


def noisy_images(sides: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    x = generator.uniform(-1, 1, (3, 3, *sides))
    return x, np.clip(x + 0.3 * generator.standard_normal(x.shape), -1, 1)


def test_ssim_equals_that_of_scipy_filters() -> None:
    """Moments by `uniform_filter`, borders cut, sample covariances: the formula of scikit-image."""
    x, y = noisy_images((24, 20))

    def mean(values: np.ndarray) -> np.ndarray:
        return uniform_filter(values, size=(1, 1, 7, 7))[..., 3:-3, 3:-3]

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, covariance = ((mean(a * b) - mean(a) * mean(b)) * 49 / 48 for a, b in ((x, x), (y, y), (x, y)))
    luminance = (2 * mean_x * mean_y + 4e-4) / (mean_x**2 + mean_y**2 + 4e-4)
    expected = luminance * (2 * covariance + 3.6e-3) / (var_x + var_y + 3.6e-3)
    np.testing.assert_allclose(ssim(x, y), expected.mean(axis=(1, 2, 3)))


def test_ssim_is_that_of_torchmetrics_inside_the_image() -> None:
    """It counts windows that reach over the border too, on mirrored pixels, and its covariances are biased: 1 in 49."""
    torch = pytest.importorskip("torch")
    measure = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    x, y = noisy_images((24, 20))
    options = {"gaussian_kernel": False, "kernel_size": 7, "data_range": (-1.0, 1.0), "return_full_image": True}
    _, found = measure(torch.from_numpy(x), torch.from_numpy(y), **options)
    inside = found[..., 3:-3, 3:-3].numpy().mean(axis=(1, 2, 3))
    np.testing.assert_allclose(ssim(x, y), inside, atol=1e-4)


def test_ssim_clips_to_the_data_range() -> None:
    generator = np.random.default_rng(4)
    x, y = 2.0 * generator.standard_normal((2, 1, 1, 8, 8))
    np.testing.assert_allclose(ssim(x, y), ssim(np.clip(x, -1, 1), np.clip(y, -1, 1)))


def test_the_peak_of_latents_is_their_range() -> None:
    """mse 1e-4 of a range of 10: 10 log10(100 / 1e-4) = 60 dB, whatever their offset."""
    reference = np.stack([np.linspace(0, 10, 50), np.linspace(100, 110, 50)])
    np.testing.assert_allclose(range_psnr(reference + 0.01, reference), [60.0, 60.0])
    np.testing.assert_allclose(range_psnr(reference, reference), [126.02, 126.02], atol=0.01)
    assert range_psnr(np.full_like(reference, np.nan), reference).tolist() == [0.0, 0.0]
    constant = np.ones((1, 4))
    assert range_psnr(constant, constant)[0] > 126 and range_psnr(constant + 1e-3, constant)[0] < 0
