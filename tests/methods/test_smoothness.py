"""The correction of the trapezoid rule, on integrands whose integral is known."""

from __future__ import annotations

import numpy as np
import pytest

from explainserve.methods.smoothness import Smoothness, smoothness

ELEMENTS = 400


def nodes(seed: int, count: int = 17) -> np.ndarray:
    """Gaps of two widths in turn, as bisecting leaves them, and end pieces of different widths."""
    random = np.random.default_rng(seed)
    gaps = np.where(random.random(count + 1) < 0.5, 1.0, 2.0)
    return np.cumsum(gaps)[:-1] / gaps.sum()


def trapezoids(alphas: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The trapezoid rule with constant extrapolation to both ends."""
    return np.trapezoid(values, alphas, axis=0) + alphas[0] * values[0] + (1 - alphas[-1]) * values[-1]


def found(alphas: np.ndarray, values: np.ndarray) -> Smoothness:
    return smoothness(alphas, np.diff(alphas), (alphas[0], 1 - alphas[-1]), values)


def polynomials(seed: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of x^0, x^1..., one row per power, and integrals over [0, 1]."""
    coefficients = np.random.default_rng(seed).standard_normal((degree + 1, ELEMENTS))
    return coefficients, coefficients.T @ (1 / np.arange(1, degree + 2))


@pytest.mark.parametrize("seed", range(4))
def test_a_straight_integrand_is_integrated_exactly_even_beyond_the_last_node(seed):
    alphas = nodes(seed)
    coefficients, exact = polynomials(seed, 1)
    values = np.vander(alphas, 2, increasing=True) @ coefficients
    correction = found(alphas, values)

    assert np.abs(trapezoids(alphas, values) - exact).max() > 1e-4 or alphas[0] == pytest.approx(1 - alphas[-1])
    np.testing.assert_allclose(trapezoids(alphas, values) + correction.coefficients @ values, exact, atol=1e-12)
    assert correction.end_share == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("degree", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_a_smooth_integrand_loses_nearly_all_of_its_error(seed, degree):
    alphas = nodes(seed)
    coefficients, exact = polynomials(seed, degree)
    values = np.vander(alphas, degree + 1, increasing=True) @ coefficients
    correction = found(alphas, values)
    before = np.linalg.norm(trapezoids(alphas, values) - exact)
    after = np.linalg.norm(trapezoids(alphas, values) + correction.coefficients @ values - exact)

    assert after < before / 5
    assert correction.gap_share < 0.02


@pytest.mark.parametrize("seed", range(4))
def test_a_rough_integrand_is_left_alone(seed):
    """Brownian motion, which jumps at every scale."""
    alphas = nodes(seed)
    steps = np.random.default_rng(seed).standard_normal((1024, ELEMENTS))
    fine = np.cumsum(steps, axis=0)
    values = fine[(alphas * 1024).astype(int)]
    correction = found(alphas, values)
    before = np.linalg.norm(trapezoids(alphas, values) - fine.mean(axis=0))
    after = np.linalg.norm(trapezoids(alphas, values) + correction.coefficients @ values - fine.mean(axis=0))

    assert after == pytest.approx(before, rel=0.02)
    assert min(correction.gap_share, correction.end_share) > 0.9


def test_the_rougher_the_smaller_the_share_that_is_applied():
    alphas = nodes(0)
    coefficients, _ = polynomials(0, 3)
    smooth = np.vander(alphas, 4, increasing=True) @ coefficients
    noise = np.random.default_rng(0).standard_normal(smooth.shape)
    shares = [found(alphas, smooth + level * noise).gap_share for level in (0.0, 0.01, 0.1, 1.0)]

    assert shares == sorted(shares)
    assert shares[0] < 0.02 < 0.9 < shares[-1]


def test_gaps_that_are_cut_further_count_with_their_own_width():
    alphas = nodes(1)
    coefficients, _ = polynomials(1, 3)
    values = np.vander(alphas, 4, increasing=True) @ coefficients
    whole = smoothness(alphas, np.diff(alphas), (0.0, 0.0), values).coefficients
    halved = smoothness(alphas, np.diff(alphas) / 2, (0.0, 0.0), values).coefficients

    np.testing.assert_allclose(halved, whole / 4)


@pytest.mark.parametrize("values", [np.zeros((17, 3)), np.full((17, 3), np.nan), np.full((17, 3), np.inf)])
def test_what_tells_nothing_is_not_corrected(values):
    correction = found(nodes(0), values)

    assert not correction.coefficients.any()
    assert (correction.gap_share, correction.end_share) == (1.0, 1.0)
