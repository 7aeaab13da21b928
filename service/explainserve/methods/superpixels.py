"""Segments that scikit-image finds in a picture. The only module that knows it; it may be missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


NOT_INSTALLED = (
    "it is not installed on this server (the extra named segmentation brings it); choose a grid where the method takes "
    "one, or send segments"
)

XRAI_SCALES = (50, 100, 150, 250, 500, 1200)
_XRAI_SIDE = 224


def dilated_segments(picture: Picture) -> Iterator[NDArray[np.bool_]]:
    """Masks of the segments that XRAI's authors' code makes: Felzenszwalb's at six scales, dilated by five pixels.

    The picture counts in [-1, 1]. Radius and least size are those for 224 x 224 pixels, in proportion to the picture,
    which the authors resize instead.
    """
    from skimage import morphology, segmentation

    share = picture.shape[0] * picture.shape[1] / _XRAI_SIDE**2
    size, radius = max(1, round(150 * share)), 5 * share**0.5
    for scale in XRAI_SCALES:
        labels = segmentation.felzenszwalb(2 * picture - 1, scale=scale, sigma=0.8, min_size=size)
        for label in range(int(labels.max()) + 1):
            grown = morphology.isotropic_dilation(labels == label, radius)  # type: ignore[no-untyped-call]
            yield np.asarray(grown)


def is_installed() -> bool:
    """Whether scikit-image is."""
    return find_spec("skimage") is not None


def check_installed(recipe: str) -> None:
    """Raises Unsupported (SEGMENTATION_NOT_INSTALLED) without scikit-image."""
    if not is_installed():
        raise Unsupported(
            "SEGMENTATION_NOT_INSTALLED",
            f"segmentation {recipe!r} needs scikit-image: {NOT_INSTALLED}",
            segmentation=recipe,
            library="scikit-image",
        )


def _is_rgb(picture: Picture) -> bool:
    return bool(picture.shape[-1] == RGB)
