"""Gaussian blur of arrays along some of their axes, edge values repeated at the border."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

CUT = 4
"""Standard deviations at which the Gaussian is cut; it is normalized afterwards."""


def gaussian_blur(values: NDArray[np.floating], sigma: float, axes: Iterable[int]) -> NDArray[np.floating]:
    """The convolution with a Gaussian of standard deviation `sigma`, in elements, positive; in the type of the values.

    Repeated edges keep constants as they are, where zeros beyond the border would darken it.
    """
    for axis in axes:
        matrix = _edge_convolution(values.shape[axis], _taps(sigma)).astype(values.dtype)
        values = np.moveaxis(np.tensordot(matrix, values, axes=(1, axis)), 0, axis)
    return values


def _taps(sigma: float) -> NDArray[np.float64]:
    radius = int(np.ceil(CUT * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.asarray(taps / taps.sum())


def _edge_convolution(size: int, taps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The convolution as a (size, size) matrix: taps that fall outside are added at the border."""
    reach = max(len(taps) // 2, size)
    taps = np.pad(taps, reach - len(taps) // 2)
    position = np.arange(size)
    matrix: NDArray[np.float64] = taps[reach + position[None, :] - position[:, None]]
    below = np.cumsum(taps)[reach - position - 1]
    matrix[:, 0] += below
    matrix[:, -1] += below[::-1]  # the taps are symmetric
    return matrix
