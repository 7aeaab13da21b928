"""Path methods beside Integrated Gradients against closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from explainserve.blur import gaussian_blur
from explainserve.errors import InvalidRequest, Unsupported
from explainserve.explanation import Attribution, Question, StopReason, Subject, attribution_sum
from explainserve.methods import (
    BlurIntegratedGradients,
    Gradient,
    GuidedIntegratedGradients,
    Idgi,
    IntegratedGradients,
    Method,
    SmoothGrad,
)
from explainserve.methods.guided_integrated_gradients import advanced
from explainserve.plan import Plan, Segment
from explainserve.sharing import shared
from explainserve.signature import MapSpec
from methods.analytic import Function, linear, question, rounds, sigmoid

RANDOM = np.random.default_rng(17)
IMAGE = RANDOM.standard_normal((2, 4, 5)).astype(np.float32)
WEIGHTS = RANDOM.standard_normal(IMAGE.size)
SIGMA = 1.5
BLURRED = gaussian_blur(IMAGE, SIGMA, (1, 2))


def cubic() -> Function:
    """Additive and separable: the sum of x^3 / 3 + x."""
    return Function(lambda x: (x**3 / 3 + x).sum(1), lambda x: x**2 + 1)


def quadratic(size: int) -> Function:
    """x A x / 2 with a random symmetric A."""
    a = np.random.default_rng(3).standard_normal((size, size))
    a = a + a.T
    return Function(lambda x: ((x @ a) * x).sum(1) / 2, lambda x: x @ a)


def smooth(size: int) -> Function:
    """The sigmoid of a sum."""
    w = np.random.default_rng(4).standard_normal(size) / 2

    def slope(x: Any) -> Any:
        z = sigmoid(x @ w)
        return (z * (1 - z))[:, None] * w

    return Function(lambda x: sigmoid(x @ w), slope)


def ask(function: Function, x: Any = IMAGE, start: Any = None, layout: str = "CHW") -> Question:
    asked = question(function, x, np.zeros_like(x) if start is None else start)
    return replace(asked, subject=Subject({"x": MapSpec("x", layout)}, asked.subject.shapes))


def explain(method: Method, function: Function, *where: Any) -> Attribution:
    return rounds(method, ask(function, *where), function)[0]


def gap(found: Attribution, asked: Question) -> float:
    """The completeness delta of a path with a start of its own."""
    assert found.baseline_output_value is not None
    return attribution_sum(found.tensors) - (asked.instance_output_value - found.baseline_output_value)


def blur(**options: Any) -> BlurIntegratedGradients:
    return BlurIntegratedGradients(max_sigma=SIGMA, **options)


def guided(**options: Any) -> GuidedIntegratedGradients:
    return GuidedIntegratedGradients(**options)


def straight(step_count: int, quadrature: str = "left") -> IntegratedGradients:
    return IntegratedGradients(step_count, quadrature)


PATHS = [straight(2), straight(5, "midpoint"), straight(3, "trapezoid"), blur(step_count=3), guided(step_count=4)]


@pytest.mark.parametrize("spacing", ["linear", "variance"])
@pytest.mark.parametrize("step_count", [1, 7])
def test_blur_explains_a_linear_function_exactly(spacing: str, step_count: int) -> None:
    found = explain(blur(step_count=step_count, spacing=spacing), linear(WEIGHTS, 0.5))

    np.testing.assert_allclose(found.tensors["x"].ravel(), WEIGHTS * (IMAGE - BLURRED).ravel(), atol=1e-5)
    assert found.baseline_output_value == pytest.approx(WEIGHTS @ BLURRED.ravel() + 0.5, rel=1e-5)
    assert found.step_count == step_count


def test_blur_of_a_separable_function_gives_each_element_its_own_change() -> None:
    found = explain(blur(step_count=200), cubic())

    np.testing.assert_allclose(found.tensors["x"], (IMAGE**3 - BLURRED**3) / 3 + IMAGE - BLURRED, atol=1e-3)


def test_blur_is_complete_of_a_quadratic_function_and_nearly_of_a_smooth_one() -> None:
    """Midpoints of chords are exact for a quadratic function; else their error falls with the square of the steps."""
    square = quadratic(IMAGE.size)
    assert gap(explain(blur(step_count=3), square), ask(square)) == pytest.approx(0, abs=1e-3)

    function = smooth(IMAGE.size)
    coarse, fine = (abs(gap(explain(blur(step_count=n), function), ask(function))) for n in (8, 64))
    assert fine < 1e-3
    assert fine < coarse / 16


def test_blur_of_a_constant_image_is_zero() -> None:
    found = explain(blur(step_count=5), linear(WEIGHTS), np.full_like(IMAGE, 0.75))

    np.testing.assert_allclose(found.tensors["x"], 0, atol=1e-6)


def test_blur_walks_from_the_blurriest_instance_to_the_instance() -> None:
    function = linear(WEIGHTS)
    asked = ask(function)
    found, _ = rounds(blur(step_count=4), asked, function)

    np.testing.assert_allclose(found.alphas, [0, 0.125, 0.375, 0.625, 0.875, 1])
    assert found.scores[0] == found.baseline_output_value
    assert found.scores[-1] == asked.instance_output_value


@pytest.mark.parametrize("method", [blur(step_count=20), Idgi(blur(step_count=20))])
def test_rounds_do_not_change_a_map(method: Method, monkeypatch: Any) -> None:
    function = smooth(IMAGE.size)
    whole, one = rounds(method, ask(function), function)
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 6)
    found, several = rounds(method, ask(function), function)

    assert (len(one), len(several)) == (1, 4)
    np.testing.assert_array_equal(found.tensors["x"], whole.tensors["x"])


def test_blur_that_runs_out_of_time_takes_the_rest_as_one_chord(monkeypatch: Any) -> None:
    """Of a linear function that is exact."""
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 3)
    function = linear(WEIGHTS)
    found, plans = rounds(blur(step_count=20), ask(function), function, final_after=2)

    assert (len(plans), found.step_count, found.stop_reason) == (2, 6, StopReason.TIME_BUDGET)
    np.testing.assert_allclose(found.tensors["x"].ravel(), WEIGHTS * (IMAGE - BLURRED).ravel(), atol=1e-5)


def test_questions_about_one_instance_share_its_blurs() -> None:
    asked = ask(linear(WEIGHTS))
    other = replace(asked, target=replace(asked.target))
    plans = [blur(step_count=5).plan(each) for each in (asked, other)]

    assert shared(plans).plan.row_count == plans[0].row_count == 6


def test_blur_needs_axes_to_blur_along() -> None:
    with pytest.raises(Unsupported) as refusal:
        blur().resolved(Subject({"x": MapSpec("x", "CHW"), "y": MapSpec("y", "T")}, {"x": (1, 2, 2), "y": (3,)}))

    assert (refusal.value.reason, refusal.value.metadata["input"]) == ("NO_SPATIAL_AXES", "y")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"step_count": 0}, "STEP_COUNT_OUT_OF_RANGE"),
        ({"max_sigma": 0.0}, "OPTION_OUT_OF_RANGE"),
        ({"max_sigma": 1000.5}, "OPTION_OUT_OF_RANGE"),
        ({"max_sigma": float("nan")}, "OPTION_OUT_OF_RANGE"),
    ],
)
def test_bad_options_of_blur_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        BlurIntegratedGradients(**options)
    assert refusal.value.reason == reason


@pytest.mark.parametrize("path", PATHS)
def test_idgi_is_complete_whatever_the_steps(path: Method) -> None:
    """Golden case: with two steps already, where the left rule is not."""
    function = cubic()
    asked = ask(function)
    found = explain(Idgi(path), function)
    start = asked.start_output_value if found.baseline_output_value is None else found.baseline_output_value
    change = asked.instance_output_value - start

    assert attribution_sum(found.tensors) == pytest.approx(change, rel=1e-5)
    assert attribution_sum(explain(straight(2), function).tensors) != pytest.approx(asked.output_change, rel=0.01)


def test_idgi_takes_the_gradient_at_the_first_end_of_each_step() -> None:
    """The authors' formula on nodes with both ends."""
    function = smooth(IMAGE.size)
    nodes = np.linspace(0, 1, 6)[:, None] * IMAGE.ravel().astype(np.float64)
    scores, squares = function.value(nodes), np.square(function.gradient(nodes))
    expected = sum((scores[j + 1] - scores[j]) * squares[j] / squares[j].sum() for j in range(5))

    for path in (straight(6, "trapezoid"), straight(5, "left")):
        found = explain(Idgi(path), function)
        np.testing.assert_allclose(found.tensors["x"].ravel(), expected, rtol=1e-4, atol=1e-8)


def test_idgi_leaves_out_a_step_without_a_gradient() -> None:
    """A step function: its change is nobody's, and the sum shows it."""
    step = Function(lambda x: (x.sum(1) > 0.3).astype(np.float64), np.zeros_like)
    found = explain(Idgi(straight(4)), step, np.ones((1, 2, 2), np.float32))

    np.testing.assert_array_equal(found.tensors["x"], 0)
    assert found.stop_reason is StopReason.FIXED_STEPS


def test_idgi_shares_its_rows_with_the_method_of_its_path() -> None:
    """And with the gradient, where a node is the instance."""
    function = cubic()
    asked = ask(function)
    for path in (straight(5, "trapezoid"), straight(5, "midpoint"), blur(step_count=4), guided(step_count=1)):
        at_instance = isinstance(path, IntegratedGradients) and path.quadrature == "trapezoid"
        methods = [path, Idgi(path), Gradient()]
        together = shared([method.plan(asked) for method in methods])
        alone = path.plan(asked).row_count

        assert together.plan.row_count == alone + 1 - at_instance
        evaluated = together.dealt(function.evaluate(together.plan))
        for method, own in zip(methods, evaluated, strict=True):
            found = method.attribution(asked, method.plan(asked), own)
            assert isinstance(found, Attribution)
            np.testing.assert_allclose(found.tensors["x"], explain(method, function).tensors["x"], rtol=1e-4, atol=1e-6)


def test_idgi_that_runs_out_of_time_takes_the_rest_as_one_step(monkeypatch: Any) -> None:
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 3)
    function = cubic()
    found, plans = rounds(Idgi(blur(step_count=20)), ask(function), function, final_after=2)

    assert (len(plans), found.step_count, found.stop_reason) == (2, 6, StopReason.TIME_BUDGET)
    assert gap(found, ask(function)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("path", [IntegratedGradients(), Gradient(), SmoothGrad(), Idgi()])
def test_idgi_needs_a_path_of_fixed_nodes(path: Method) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        Idgi(path)
    assert refusal.value.reason == "BASE_METHOD_UNSUITABLE"


@pytest.mark.parametrize("options", [{}, {"fraction": 0.01}, {"fraction": 1.0}, {"max_distance": 1.0, "step_count": 3}])
def test_guided_explains_a_linear_function_as_integrated_gradients_do(options: dict[str, Any]) -> None:
    start = np.flip(IMAGE, 2).copy()
    found = explain(guided(**options), linear(WEIGHTS, 0.5), IMAGE, start)

    np.testing.assert_allclose(found.tensors["x"].ravel(), WEIGHTS * (IMAGE - start).ravel(), rtol=1e-5, atol=1e-6)


def test_guided_of_a_separable_function_gives_each_element_its_own_change() -> None:
    found = explain(guided(step_count=900), cubic())

    np.testing.assert_allclose(found.tensors["x"], IMAGE**3 / 3 + IMAGE, rtol=0.03, atol=1e-3)


def test_guided_is_complete_on_its_own_path_with_many_steps() -> None:
    function = quadratic(IMAGE.size)
    asked = ask(function)
    coarse, fine = (
        abs(attribution_sum(explain(guided(step_count=n), function).tensors) - asked.output_change) for n in (50, 800)
    )

    assert fine < 0.02 * abs(asked.output_change)
    assert fine < coarse / 8


def test_guided_moves_where_the_gradient_is_small_first() -> None:
    """Two elements of x1^2 + 100 x2^2 from (1, 1): of its own will the path goes along the first until it is there."""
    function = Function(lambda x: x**2 @ [1.0, 100.0], lambda x: 2 * x * [1.0, 100.0])
    method = guided(step_count=10, fraction=0.5, max_distance=1.0)
    _, plans = rounds(method, ask(function, [2.0, 2.0], [1.0, 1.0], layout=""), function)
    points = [plan.segments[0].start["x"].tolist() for plan in plans]

    np.testing.assert_allclose(points, [[min(2, 1 + k / 5), max(1, k / 5)] for k in range(10)], rtol=1e-6)


def test_guided_stays_near_the_straight_line() -> None:
    function = smooth(IMAGE.size)
    _, plans = rounds(guided(step_count=20, max_distance=0.1), ask(function), function)

    for k, plan in enumerate(plans):
        progress = plan.segments[0].start["x"] / IMAGE
        assert np.abs(progress - k / 20).max() <= 0.1 + 1e-5
        assert np.average(progress, weights=np.abs(IMAGE)) == pytest.approx(k / 20, abs=1e-6)


def test_a_step_of_guided_moves_batches_by_their_slopes() -> None:
    """By hand: an average of .5 over lengths 1, 1, 2, 4 asks for 4 in all, of which the first has .25 already."""
    progress, lengths = np.array([0.25, 0, 0, 0]), np.array([1.0, 1, 2, 4])
    slopes = np.array([0.1, 0.3, 0.2, 0.4])

    def after(max_distance: float, batch: int, slopes: Any = slopes) -> Any:
        return advanced(progress, slopes, lengths, 0.5, max_distance, batch)

    np.testing.assert_allclose(after(1, 1), [1, 1, 1, 0])  # .75 + 2 + 1, and nothing is left of .75 + 3
    np.testing.assert_allclose(after(1, 3), [1, 1, 1, 0])
    np.testing.assert_allclose(after(1, 4), progress + (3.75 / 7.75) * (1 - progress))
    np.testing.assert_allclose(after(0.25, 1), [0.75, 0.75, 0.75, 0.25])
    np.testing.assert_allclose(after(1, 1, np.full(4, 0.3)), after(1, 4))  # equal slopes go together


def test_guided_from_a_baseline_that_is_the_instance_is_zero() -> None:
    found = explain(guided(step_count=3), cubic(), IMAGE, IMAGE)

    np.testing.assert_array_equal(found.tensors["x"], 0)


def test_guided_does_not_depend_on_the_order_of_elements() -> None:
    """Its ties do not either: the gradients of this function are equal in pairs."""
    w = np.repeat(np.random.default_rng(8).standard_normal(6), 2)
    x, order = RANDOM.standard_normal(12).astype(np.float32), RANDOM.permutation(12)

    def bent(weights: Any) -> Function:
        def slope(rows: Any) -> Any:
            return np.cos(rows @ weights)[:, None] * weights

        return Function(lambda rows: np.sin(rows @ weights), slope)

    method = guided(step_count=20, max_distance=0.3)
    found = explain(method, bent(w), x, None, "")
    np.testing.assert_allclose(
        found.tensors["x"][order],
        explain(method, bent(w[order]), x[order], None, "").tensors["x"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_guided_that_runs_out_of_time_goes_straight_to_the_instance() -> None:
    """Of a linear function that is exact."""
    found, plans = rounds(guided(), ask(linear(WEIGHTS)), linear(WEIGHTS), final_after=4)

    assert (len(plans), found.step_count, found.stop_reason) == (4, 4, StopReason.TIME_BUDGET)
    np.testing.assert_allclose(found.tensors["x"].ravel(), WEIGHTS * IMAGE.ravel(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.alphas, [0, 0.005, 0.01, 0.015, 1])


def test_guided_and_idgi_along_it_share_every_step() -> None:
    function = smooth(IMAGE.size)
    asked = ask(function)
    method = guided(step_count=5)
    upcoming: list[tuple[Method, Attribution | Plan]] = [(each, each.plan(asked)) for each in (method, Idgi(method))]
    for _ in range(5):
        plans = [plan for _, plan in upcoming if isinstance(plan, Plan)]
        together = shared(plans)
        assert together.plan.row_count == 1
        dealt = together.dealt(function.evaluate(together.plan))
        upcoming = [
            (each, each.attribution(asked, plan, own))
            for (each, _), plan, own in zip(upcoming, plans, dealt, strict=True)
        ]

    assert all(isinstance(answer, Attribution) for _, answer in upcoming)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"step_count": 0}, "STEP_COUNT_OUT_OF_RANGE"),
        ({"fraction": 0.0}, "OPTION_OUT_OF_RANGE"),
        ({"fraction": 1.1}, "OPTION_OUT_OF_RANGE"),
        ({"max_distance": 0.0}, "OPTION_OUT_OF_RANGE"),
        ({"max_distance": float("inf")}, "OPTION_OUT_OF_RANGE"),
    ],
)
def test_bad_options_of_guided_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        guided(**options)
    assert refusal.value.reason == reason


@pytest.mark.parametrize("method", [blur(step_count=9), guided(step_count=6), *map(Idgi, PATHS)])
def test_cost_is_what_is_evaluated(method: Method) -> None:
    asked = ask(cubic())
    segments: list[Segment] = [own for plan in rounds(method, asked, cubic())[1] for own in plan.segments]
    cost = method.cost(asked.subject)

    assert cost.min_gradient_rows == cost.max_gradient_rows == sum(own.backward_count for own in segments)
    assert (
        cost.min_forward_rows == cost.max_forward_rows == sum(own.row_count for own in segments if not own.function.wrt)
    )


@pytest.mark.parametrize("method", [blur(step_count=5), Idgi(), guided(step_count=5)])
def test_a_map_that_is_not_finite_says_so(method: Method) -> None:
    broken = Function(lambda x: x.sum(1), lambda x: np.full_like(x, np.nan))

    assert explain(method, broken).stop_reason is StopReason.NON_FINITE


@pytest.mark.parametrize("method", [blur(step_count=3)])
def test_noise_around_a_path_method(method: Method) -> None:
    """Of a linear function the mean over noise is the map without noise, within the standard error."""
    found = explain(SmoothGrad(base=method, sample_count=64, noise_std=0.1), linear(WEIGHTS))
    clean = explain(method, linear(WEIGHTS)).tensors["x"]

    assert (np.abs(found.tensors["x"] - clean) <= 4.5 * found.standard_errors["x"] + 1e-5).all()
