"""Weighted least squares on the presence of segments, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Fit

Values = NDArray[np.float64]

MAX_FEATURES = 1024
"""Segments of one regression, which bounds its time and memory."""
CONDITION = 1e-12
"""Directions below this share of the largest are left out: the samples do not tell them."""


def held_to_sum(present: NDArray[np.bool_], gains: Values, weights: Values, total: float) -> tuple[Values, Fit]:
    """Values of segments, without intercept, that sum to `total`; of equally good ones those nearest to equal parts.

    Args:
        present: shape (samples, segments).
        gains: of each sample against none present, shape (samples,).
    """
    count = present.shape[1]
    share = present.mean(axis=1)
    design = present - share[:, None]
    weighted = design * weights[:, None]
    moments = weighted.T @ design + 1.0  # fixes the direction of the sum, which the design does not have
    apart = _solved(moments, weighted.T @ (gains - total * share))
    values = apart - apart.mean() + total / count
    return values, Fit(_r_squared(gains, present @ values, weights), intercept=0.0)


def ridge(present: NDArray[np.bool_], scores: Values, weights: Values, penalty: float) -> tuple[Values, Fit]:
    """Coefficients of segments beside an intercept that is not penalized.

    Args:
        present: shape (samples, segments).
        scores: shape (samples,).
        penalty: times the sum of squared coefficients.
    """
    center, level = np.average(present, axis=0, weights=weights), np.average(scores, weights=weights)
    design = present - center
    weighted = design * weights[:, None]
    moments = weighted.T @ design + penalty * np.eye(present.shape[1])
    values = _solved(moments, weighted.T @ (scores - level))
    fitted = level + design @ values
    return values, Fit(_r_squared(scores, fitted, weights), intercept=float(level - center @ values))


def regression_bytes(sample_count: int, feature_count: int) -> int:
    """What one of them takes."""
    return 8 * feature_count * (3 * sample_count + 3 * feature_count)


def _solved(moments: Values, projected: Values) -> Values:
    if not np.isfinite(projected).all():
        return np.full(len(projected), np.nan)
    return np.asarray(np.linalg.lstsq(moments, projected, rcond=CONDITION)[0])


def _r_squared(scores: Values, fitted: Values, weights: Values) -> float | None:
    total = weights @ np.square(scores - np.average(scores, weights=weights))
    return float(1 - weights @ np.square(scores - fitted) / total) if total > 0 else None
