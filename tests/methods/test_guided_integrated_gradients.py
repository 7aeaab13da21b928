"""Guided Integrated Gradients against its algorithm in plain numpy, and against closed forms of map and gap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from explainserve.explanation import attribution_sum
from explainserve.methods import GuidedIntegratedGradients
from methods.analytic import Function, question, rectified, rounds

Vector = NDArray[np.float64]

SIZE = 12


def algorithm_1(
    gradient: Callable[[Vector], Vector],
    baseline: Vector,
    instance: Vector,
    steps: int,
    fraction: float,
    max_distance: float,
) -> tuple[Vector, Vector]:
    """Algorithm 1 of Kapishnikov et al. 2021, one batch of elements after the other, with the bound of the authors'
    code on the distance from the straight line.

    Returns:
        The map, and the points at which gradients were taken, shape (steps, elements).
    """
    x, whole, found, points = baseline.copy(), np.abs(instance - baseline), np.zeros(len(baseline)), []
    rank = int(fraction * (len(x) - 1))
    for step in range(1, steps + 1):
        slopes, before = gradient(x), x.copy()
        points.append(before)
        low, high = (
            baseline + np.clip(step / steps + side, 0, 1) * (instance - baseline)
            for side in (-max_distance, max_distance)
        )
        x = np.where(np.abs(instance - x) > np.abs(instance - low), low, x)
        missing = np.abs(instance - x).sum() - (1 - step / steps) * whole.sum()
        while missing > 1e-9 * whole.sum():
            room = np.abs(high - x)
            ranked = np.where(room > 1e-9 * whole, np.abs(slopes), np.inf)
            chosen = (ranked <= np.sort(ranked)[rank]) & np.isfinite(ranked)
            share = min(1.0, missing / room[chosen].sum())
            x = np.where(chosen, x + share * (high - x), x)
            missing -= share * room[chosen].sum()
        found += slopes * (x - before)
    return found, np.array(points)


def coupled() -> Function:
    """x1^2 + 100 x2^2 + 2 x1 x2."""
    a = np.array([[2.0, 2.0], [2.0, 200.0]])
    return Function(lambda x: ((x @ a) * x).sum(1) / 2, lambda x: x @ a)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 1.0])
@pytest.mark.parametrize("max_distance", [0.02, 0.2, 1.0])
def test_it_walks_as_the_algorithm_does(fraction: float, max_distance: float) -> None:
    function, random = rectified(5, size=SIZE), np.random.default_rng(6)
    baseline, instance = (random.standard_normal(SIZE).astype(np.float32).astype(np.float64) for _ in range(2))
    method = GuidedIntegratedGradients(step_count=15, fraction=fraction, max_distance=max_distance)
    expected, points = algorithm_1(
        lambda x: function.gradient(x[None])[0], baseline, instance, 15, fraction, max_distance
    )

    found, plans = rounds(method, question(function, instance, baseline), function)

    np.testing.assert_allclose([plan.segments[0].start["x"] for plan in plans], points, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.tensors["x"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step_count", [2, 10, 200])
def test_an_interaction_goes_to_the_element_that_moves_last(step_count: int) -> None:
    """Of its own will the path goes along the first element, whose slope is smaller, and then along the second:
    F(2, 1) - F(1, 1) = 5 and F(2, 2) - F(2, 1) = 304 but for the left rule's error, where the straight line has 6 and
    303.
    """
    function, pieces = coupled(), step_count / 2
    method = GuidedIntegratedGradients(step_count=step_count, fraction=0.5, max_distance=1.0)

    found, _ = rounds(method, question(function, [2.0, 2.0], [1.0, 1.0]), function)

    np.testing.assert_allclose(found.tensors["x"], [5 - 1 / pieces, 304 - 100 / pieces], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"max_distance": 1.0}, {"fraction": 0.1, "max_distance": 0.1}])
def test_the_gap_is_what_the_gradient_changes_within_the_steps(options: dict[str, Any]) -> None:
    """Each step has the gradient at its start: of x A x / 2 it misses d A d / 2."""
    random = np.random.default_rng(7)
    a = random.standard_normal((SIZE, SIZE))
    a = a + a.T
    function = Function(lambda x: ((x @ a) * x).sum(1) / 2, lambda x: x @ a)
    asked = question(function, random.standard_normal(SIZE), random.standard_normal(SIZE))

    found, plans = rounds(GuidedIntegratedGradients(step_count=20, **options), asked, function)
    points = [*(plan.segments[0].start["x"] for plan in plans), asked.instance.moving["x"]]
    steps = np.diff(np.array(points, np.float64), axis=0)
    missed = -0.5 * np.einsum("ki,ij,kj", steps, a, steps)

    assert abs(missed) > 0.001 * abs(asked.output_change)
    assert attribution_sum(found.tensors) - asked.output_change == pytest.approx(missed, rel=1e-3)
