"""Planes: arrays over the H and W axes of an input, in this order, whatever its own order of axes."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Subject

T = TypeVar("T", bound=np.generic)


def extent(subject: Subject, name: str) -> tuple[int, int]:
    """H and W of an input that has these axes."""
    shape = subject.shapes[name]
    height, width = _axes(subject, name)
    return shape[height], shape[width]


def laid_over(plane: NDArray[T], subject: Subject, name: str) -> NDArray[T]:
    """A plane of shape (H, W) along these axes of an input, with extent 1 along all others."""
    axes = _axes(subject, name)
    others = tuple(axis for axis in range(len(subject.shapes[name])) if axis not in axes)
    return np.expand_dims(plane if axes[0] < axes[1] else plane.T, others)


def _axes(subject: Subject, name: str) -> tuple[int, int]:
    axes = subject.maps[name].spatial_axes
    assert axes is not None, "An input without H and W axes was chosen. This is a bug."
    return axes
