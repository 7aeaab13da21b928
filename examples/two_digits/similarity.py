"""How alike two displayed maps look: root mean square difference and structural similarity."""

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float64]

WINDOW = 11
SIGMA = 1.5


def rms_difference(first: Plane, second: Plane) -> float:
    """Root mean square difference of displayed values."""
    return float(np.sqrt(np.mean((first - second) ** 2)))


def ssim(first: Plane, second: Plane, data_range: float) -> float:
    """Mean structural similarity with an 11 x 11 Gaussian window of sigma 1.5, K1 = .01, K2 = .03, over full windows.

    Source: Wang, Bovik, Sheikh, Simoncelli, Image Quality Assessment, IEEE TIP 2004.

    Args:
        first, second: displayed values, shape (height, width), each side at least 11.
        data_range: extent of the display scale.
    """
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean1, mean2 = _blurred(first), _blurred(second)
    var1 = _blurred(first * first) - mean1**2
    var2 = _blurred(second * second) - mean2**2
    covariance = _blurred(first * second) - mean1 * mean2
    luminance = (2 * mean1 * mean2 + c1) / (mean1**2 + mean2**2 + c1)
    structure = (2 * covariance + c2) / (var1 + var2 + c2)
    return float(np.mean(luminance * structure))


def _blurred(plane: Plane) -> Plane:
    offsets = np.arange(WINDOW) - WINDOW // 2
    taps = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(plane, WINDOW, axis=axis)
        plane = windows @ taps
    return plane
