"""Methods around the gradient against closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from explainserve.errors import DeadlineExceeded, InvalidRequest
from explainserve.explanation import Attribution, Baseline, StopReason
from explainserve.methods import (
    ExpectedGradients,
    Gradient,
    GradientXInput,
    IntegratedGradients,
    Method,
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
)
from methods.analytic import Function, linear, question, rounds

W = [2.0, -3.0]
X = [1.0, 1.0]
A = np.array([[2.0, 0.5], [0.5, -1.0]])
B = np.array([0.25, 1.0])
NOISE_FAMILY = [SmoothGrad, SmoothGradSquared, VarGrad]
OPTIONS: dict[str, Any] = {"sample_count": 400, "noise_std": 0.5}


def quadratic() -> Function:
    """x A x / 2 + b x."""
    return Function(lambda x: ((x @ A) * x).sum(1) / 2 + x @ B, lambda x: x @ A + B)


def explain(method: Method, function: Function, x: Any = X, *starts: Any) -> Attribution:
    asked = question(function, x, starts[0] if starts else np.zeros_like(x))
    baselines = tuple(Baseline({"x": np.asarray(start, np.float32)}) for start in starts)
    return rounds(method, replace(asked, baselines=baselines or asked.baselines), function)[0]


def within_three_errors(found: Attribution, expected: Any) -> None:
    assert found.map_error is not None
    assert (np.abs(found.tensors["x"] - expected) <= 3 * found.standard_errors["x"] + 1e-5).all()


def test_of_a_linear_function() -> None:
    function = linear(W, 0.5)

    np.testing.assert_allclose(explain(Gradient(), function).tensors["x"], W)
    np.testing.assert_allclose(explain(GradientXInput(), function, [2.0, 5.0]).tensors["x"], [4, -15])
    np.testing.assert_allclose(explain(SmoothGrad(seed=3), function).tensors["x"], W)
    np.testing.assert_allclose(explain(SmoothGradSquared(seed=4), function).tensors["x"], np.square(W))
    np.testing.assert_allclose(explain(VarGrad(), function).tensors["x"], 0, atol=1e-12)
    np.testing.assert_allclose(
        explain(ExpectedGradients(), function, X, [0.0, 1.0], [0.5, 3.0]).tensors["x"],
        W * (X - np.array([0.25, 2])),
        rtol=1e-6,
    )


def test_of_a_quadratic_function_within_three_standard_errors() -> None:
    """SmoothGrad is A x + b, its square adds sigma^2 sum_j A_ij^2, which is the variance."""
    gradient, variance = A @ X + B, 0.25 * np.square(A).sum(axis=1)

    within_three_errors(explain(SmoothGrad(**OPTIONS), quadratic()), gradient)
    within_three_errors(explain(SmoothGradSquared(**OPTIONS), quadratic()), np.square(gradient) + variance)
    within_three_errors(explain(VarGrad(**OPTIONS), quadratic()), variance)


def test_expected_gradients_is_the_mean_of_integrated_gradients() -> None:
    starts = [[0.0, 0.0], [1.0, -2.0]]
    exact = np.mean([(np.array(X) - s) * (A @ (np.array(X) + s) / 2 + B) for s in starts], axis=0)
    found = explain(ExpectedGradients(sample_count=200), quadratic(), X, *starts)

    np.testing.assert_allclose(found.tensors["x"], exact, rtol=5e-3)
    within_three_errors(found, exact)


@pytest.mark.parametrize("kind", NOISE_FAMILY)
def test_samples_do_not_depend_on_rounds_and_depend_on_the_seed(kind: type[Method], monkeypatch: Any) -> None:
    def map_of(seed: int) -> Any:
        return explain(kind(sample_count=40, seed=seed, noise_std=0.5), quadratic()).tensors["x"]  # type: ignore[call-arg]

    whole = map_of(1)
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 7)
    np.testing.assert_array_equal(map_of(1), whole)
    assert (map_of(2) != whole).all()


def test_noise_around_integrated_gradients() -> None:
    """A base that takes rounds and scores: of a linear function each sample is w (x + noise - x')."""
    method = SmoothGrad(base=IntegratedGradients(), sample_count=64, noise_std=0.1)
    found = explain(method, linear(W))

    assert found.step_count == 64 * 16
    within_three_errors(found, np.multiply(W, X))


@pytest.mark.parametrize("method", [SmoothGrad(sample_count=60), ExpectedGradients(sample_count=60)])
def test_time_that_ends_leaves_the_map_of_the_samples_that_are_done(method: Method, monkeypatch: Any) -> None:
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 8)
    asked = question(quadratic(), X, np.zeros(2))
    found, plans = rounds(method, asked, quadratic(), final_after=3)

    assert len(plans) == 3
    assert (found.step_count, found.stop_reason) == (24, StopReason.TIME_BUDGET)


def test_time_that_ends_within_a_sample_takes_what_it_has() -> None:
    """The scores of the samples come first, then the rounds of their paths."""
    endless = IntegratedGradients(tolerance=1e-9, completeness_tolerance=1e-9)
    method = SmoothGrad(base=endless, sample_count=4, noise_std=0.1)
    asked = question(quadratic(), X, np.zeros(2))
    with pytest.raises(DeadlineExceeded) as late:
        rounds(method, asked, quadratic(), final_after=1)
    assert late.value.reason == "TIME_BUDGET_TOO_SHORT"

    found, _ = rounds(method, asked, quadratic(), final_after=2)
    assert (found.step_count, found.stop_reason) == (4 * 8, StopReason.TIME_BUDGET)


def test_a_map_that_is_not_finite_says_so() -> None:
    broken = Function(lambda x: x.sum(1), lambda x: np.full_like(x, np.nan))

    for method in (Gradient(), GradientXInput(), SmoothGrad(), ExpectedGradients()):
        found = explain(method, broken)
        assert (found.stop_reason, found.map_error) == (StopReason.NON_FINITE, None)


@pytest.mark.parametrize("kind", NOISE_FAMILY)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sample_count": 1}, "SAMPLE_COUNT_OUT_OF_RANGE"),
        ({"seed": -1}, "SEED_OUT_OF_RANGE"),
        ({"noise_level": 0.0}, "OPTION_OUT_OF_RANGE"),
        ({"noise_std": float("nan")}, "OPTION_OUT_OF_RANGE"),
        ({"noise_std": 1e300}, "OPTION_OUT_OF_RANGE"),
        ({"noise_level": 1e38}, "OPTION_OUT_OF_RANGE"),
        ({"noise_level": 0.1, "noise_std": 0.1}, "NOISE_CONFLICT"),
        ({"base": SmoothGrad()}, "BASE_METHOD_UNSUITABLE"),
    ],
)
def test_bad_options_are_refused(kind: type[Method], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        kind(**options)
    assert refusal.value.reason == reason


def test_the_standard_error_of_a_stratified_mean_is_its_scatter_over_seeds() -> None:
    """Of a curved integrand; as if the samples were independent it would be ten times as large."""
    cubic = Function(lambda x: (x**4).sum(1), lambda x: 4 * x**3)
    found = [explain(ExpectedGradients(sample_count=40, seed=seed), cubic) for seed in range(40)]
    scatter = np.std([one.tensors["x"] for one in found], axis=0, ddof=1)
    stated = np.sqrt(np.mean([np.square(one.standard_errors["x"]) for one in found], axis=0))

    assert (stated / scatter < 2).all() and (stated / scatter > 0.5).all()


def test_expected_gradients_cut_in_time_have_seen_the_whole_path(monkeypatch: Any) -> None:
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 8)
    saturating = Function(lambda x: np.minimum(x, 0.2).sum(1), lambda x: 1.0 * (x < 0.2))
    found, _ = rounds(
        ExpectedGradients(sample_count=64), question(saturating, X, np.zeros(2)), saturating, final_after=1
    )

    assert found.step_count == 8
    np.testing.assert_allclose(found.tensors["x"], 0.2, atol=0.1)


def test_two_samples_tell_no_error_of_their_variance() -> None:
    """Both are equally far from their mean, which looks as if the variance was certain."""
    found = explain(VarGrad(sample_count=2, noise_std=0.5), quadratic())

    assert (found.map_error, found.standard_errors) == (None, {})
    assert explain(VarGrad(sample_count=3, noise_std=0.5), quadratic()).map_error is not None


def test_every_baseline_needs_a_sample() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        explain(ExpectedGradients(sample_count=1), linear(W), X, [0.0, 0.0], [1.0, 0.0])
    assert refusal.value.reason == "SAMPLE_COUNT_OUT_OF_RANGE"


@pytest.mark.parametrize("method", [Gradient(), GradientXInput(), SmoothGrad(), ExpectedGradients(sample_count=30)])
def test_cost_is_what_is_evaluated(method: Method) -> None:
    asked = question(quadratic(), X, np.zeros(2))
    _, plans = rounds(method, asked, quadratic())
    cost = method.cost(asked.subject)

    rows = sum(plan.row_count for plan in plans)
    assert cost.min_gradient_rows == cost.max_gradient_rows == cost.common_gradient_rows == rows
