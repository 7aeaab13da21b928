"""Segments that scikit-image finds in a picture. The only module that knows it; it may be missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import Unsupported

Picture = NDArray[np.float64]
RGB = 3


def slic(picture: Picture, segment_count: int) -> NDArray[np.int64]:
    """SLIC (Achanta et al. 2012) with compactness 10, in Lab where there are three channels."""
    from skimage import segmentation

    lab = _is_rgb(picture)
    return np.asarray(segmentation.slic(picture, n_segments=segment_count, compactness=10, convert2lab=lab))


def quickshift(picture: Picture, segment_count: int) -> NDArray[np.int64]:
    """Quickshift (Vedaldi, Soatto 2008) as LIME's authors use it, in Lab where there are three channels."""
    from skimage import segmentation

    options = {"kernel_size": 4, "max_dist": 200, "ratio": 0.2, "convert2lab": _is_rgb(picture), "rng": 0}
    return np.asarray(segmentation.quickshift(picture, **options))  # type: ignore[no-untyped-call]


def felzenszwalb(picture: Picture, segment_count: int) -> NDArray[np.int64]:
    """Felzenszwalb and Huttenlocher 2004."""
    from skimage import segmentation

    return np.asarray(segmentation.felzenszwalb(picture, scale=100, sigma=0.8, min_size=20))


FINDERS: Mapping[str, Callable[[Picture, int], NDArray[np.int64]]] = {
    "slic": slic,
    "quickshift": quickshift,
    "felzenszwalb": felzenszwalb,
}
"""By the name of the recipe: labels of shape (H, W) of a picture of shape (H, W, channels) with values in [0, 1], and
the number of segments that is asked for, which only SLIC heeds."""


def check_installed(recipe: str) -> None:
    """Raises Unsupported (SEGMENTATION_NOT_INSTALLED) without scikit-image."""
    if find_spec("skimage") is None:
        raise Unsupported(
            "SEGMENTATION_NOT_INSTALLED",
            f"segmentation {recipe!r} needs scikit-image, which is not installed on this server (the extra named "
            "segmentation brings it); choose a grid, or send segments",
            segmentation=recipe,
            library="scikit-image",
        )


def _is_rgb(picture: Picture) -> bool:
    return bool(picture.shape[-1] == RGB)
