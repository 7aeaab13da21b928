"""Gaussian blur with repeated edges against the convolution of a padded array."""

from __future__ import annotations

import numpy as np
import pytest

from explainserve.blur import gaussian_blur

VALUES = np.random.default_rng(5).standard_normal((3, 7, 1, 5))


def convolved(values: np.ndarray, sigma: float, axes: tuple[int, ...]) -> np.ndarray:
    radius = int(np.ceil(4 * sigma))
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    for axis in axes:
        pad = [(radius, radius) if k == axis else (0, 0) for k in range(values.ndim)]
        padded = np.pad(values, pad, mode="edge")
        values = np.apply_along_axis(np.convolve, axis, padded, taps / taps.sum(), mode="valid")
    return values


@pytest.mark.parametrize("sigma", [0.05, 0.7, 1.3, 40.0])
@pytest.mark.parametrize("axes", [(1,), (2,), (3, 1), (0, 1, 2, 3)])
def test_it_is_the_convolution_of_the_padded_array(sigma: float, axes: tuple[int, ...]) -> None:
    np.testing.assert_allclose(gaussian_blur(VALUES, sigma, axes), convolved(VALUES, sigma, axes), atol=1e-12)


def test_it_keeps_constants_and_the_type() -> None:
    blurred = gaussian_blur(np.full((4, 6), 3, np.float32), 2.0, (0, 1))

    assert blurred.dtype == np.float32
    np.testing.assert_allclose(blurred, 3, rtol=1e-6)
