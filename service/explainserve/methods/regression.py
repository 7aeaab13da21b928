"""Weighted least squares on the presence of segments, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Fit

Values = NDArray[np.float64]

MAX_FEATURES = 1024
"""Segments of one regression, which bounds its time and memory."""
CONDITION = 1e-12
"""Directions below this share of the largest are left out: the samples do not tell them."""


@dataclass(frozen=True, eq=False)
class Regression:
    """What a regression says of segments, and how much each sample has its say.

    Attributes:
        values: shape (segments,).
        fit: how well they explain the scores.
        influences: what each sample's residual adds to each value, shape (samples, segments): rows of A^-1 x w e, with
            the moments A, a sample's centered presence x, its weight w and its residual e.
    """

    values: Values
    fit: Fit
    influences: Values


def held_to_sum(present: NDArray[np.bool_], gains: Values, weights: Values, total: float) -> Regression:
    """Values of segments, without intercept, that sum to `total`; of equally good ones those nearest to equal parts.

    Args:
        present: shape (samples, segments).
        gains: of each sample against none present, shape (samples,).
    """
    count = present.shape[1]
    share = present.mean(axis=1)
    design = present - share[:, None]
    weighted = design * weights[:, None]
    inverse = _inverse(weighted.T @ design + 1.0)  # fixes the direction of the sum, which the design does not have
    apart = inverse @ (weighted.T @ (gains - total * share))
    values = apart - apart.mean() + total / count
    residuals = gains - present @ values
    influences = (weighted * residuals[:, None]) @ inverse
    fit = Fit(_r_squared(gains, residuals, weights), intercept=0.0)
    return Regression(values, fit, influences - influences.mean(axis=1, keepdims=True))


def ridge(present: NDArray[np.bool_], scores: Values, weights: Values, penalty: float) -> Regression:
    """Coefficients of segments beside an intercept that is not penalized.

    Args:
        present: shape (samples, segments).
        scores: shape (samples,).
        penalty: times the sum of squared coefficients.
    """
    center, level = np.average(present, axis=0, weights=weights), np.average(scores, weights=weights)
    design = present - center
    weighted = design * weights[:, None]
    inverse = _inverse(weighted.T @ design + penalty * np.eye(present.shape[1]))
    values = inverse @ (weighted.T @ (scores - level))
    residuals = scores - level - design @ values
    fit = Fit(_r_squared(scores, residuals, weights), intercept=float(level - center @ values))
    return Regression(values, fit, (weighted * residuals[:, None]) @ inverse)


def regression_bytes(sample_count: int, feature_count: int) -> int:
    """What one of them takes."""
    return 8 * feature_count * (5 * sample_count + 3 * feature_count)


def _inverse(moments: Values) -> Values:
    return np.asarray(np.linalg.pinv(moments, rcond=CONDITION, hermitian=True))


def _r_squared(scores: Values, residuals: Values, weights: Values) -> float | None:
    total = weights @ np.square(scores - np.average(scores, weights=weights))
    return float(1 - weights @ np.square(residuals) / total) if total > 0 else None
