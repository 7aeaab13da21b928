"""Integrated Gradients against closed forms and its axioms, under every rule."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explainserve.errors import InvalidRequest
from explainserve.explanation import StopReason, absolute_sum, attribution_sum
from explainserve.methods import METHODS, Cost, IntegratedGradients
from explainserve.methods.quadrature import RULES
from explainserve.plan import Evaluation, Plan, SegmentEvaluation
from methods.analytic import Function, explain, linear, question, rectified, ridge, rounds, steep

FIXED = [{"quadrature": name, "step_count": n} for name in RULES for n in (2, 7, 16)]
EVERY_RULE = [*FIXED, {}]
ACCURATE = [{"quadrature": "midpoint", "step_count": 512}, {"quadrature": "gauss_legendre", "step_count": 64}, {}]


def attributions(function, x, baseline, **options):
    return explain(function, x, baseline, **options).tensors["x"]


# --- options ---------------------------------------------------------------------------------------------------------


def test_defaults_are_filled_in():
    assert IntegratedGradients().quadrature == "adaptive"
    assert IntegratedGradients(step_count=4).quadrature == "midpoint"
    assert IntegratedGradients() == IntegratedGradients(quadrature="adaptive")
    assert replace(IntegratedGradients(step_count=4), step_count=5) == IntegratedGradients(step_count=5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"step_count": 0}, "STEP_COUNT_OUT_OF_RANGE"),
        ({"step_count": -3}, "STEP_COUNT_OUT_OF_RANGE"),
        ({"step_count": 1, "quadrature": "trapezoid"}, "STEP_COUNT_OUT_OF_RANGE"),
        ({"max_step_count": 15}, "STEP_COUNT_OUT_OF_RANGE"),
        ({"step_count": 8, "quadrature": "adaptive"}, "QUADRATURE_CONFLICT"),
        ({"quadrature": "simpson"}, "UNKNOWN_QUADRATURE"),
        *[({"quadrature": name}, "QUADRATURE_CONFLICT") for name in RULES],
        *[({"tolerance": value}, "TOLERANCE_OUT_OF_RANGE") for value in (0, -0.1, 1.1, math.nan, math.inf)],
        ({"completeness_tolerance": 0}, "TOLERANCE_OUT_OF_RANGE"),
    ],
)
def test_bad_options_are_refused(options, reason):
    with pytest.raises(InvalidRequest) as refusal:
        IntegratedGradients(**options)
    assert refusal.value.reason == reason
    assert refusal.value.metadata


def test_cost():
    asked = question(linear([1.0]), [1.0], [0.0])
    assert IntegratedGradients(step_count=9).cost(asked.subject) == Cost.fixed(9)
    assert IntegratedGradients(max_step_count=200).cost(asked.subject).max_gradient_rows == 200
    pilot = IntegratedGradients().plan(asked)
    assert IntegratedGradients().cost(asked.subject).common_gradient_rows == pilot.row_count
    assert METHODS["integrated_gradients"] is IntegratedGradients


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FIXED, ids=str)
def test_a_fixed_rule_is_one_segment_from_baseline_to_instance(options):
    function = linear([1.0, 2.0])
    asked = question(function, [3.0, 1.0], [1.0, 0.0])
    (segment,) = IntegratedGradients(**options).plan(asked).segments
    assert segment.start is asked.baseline.moving and segment.end is asked.instance.moving
    assert segment.selectors == (asked.target.selector,) and segment.function == asked.gradient
    nodes, weights = RULES[options["quadrature"]].nodes_and_weights(options["step_count"])
    assert segment.alphas.tolist() == nodes.tolist() and segment.weights.tolist() == weights.tolist()


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_the_score_path_ascends_from_baseline_to_instance(options):
    function = rectified(3)
    x, baseline = np.random.default_rng(3).normal(size=(2, 12))
    asked = question(function, x, baseline)
    attribution, _ = rounds(IntegratedGradients(**options), asked, function)
    assert attribution.alphas[0] == 0 and attribution.alphas[-1] == 1
    assert np.all(np.diff(attribution.alphas) > 0)
    assert attribution.scores[0] == asked.baseline_output_value
    assert attribution.scores[-1] == asked.instance_output_value
    x, baseline = np.float32([x, baseline]).astype(np.float64)
    rows = baseline + attribution.alphas[:, None] * (x - baseline)
    np.testing.assert_allclose(attribution.scores, function.value(rows), rtol=1e-6, atol=1e-9)
    assert set(function.alphas) <= set(attribution.alphas)


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_step_count_is_the_number_of_gradients(options):
    function = rectified(4)
    attribution = explain(function, *np.random.default_rng(4).normal(size=(2, 12)), **options)
    assert attribution.step_count == len(function.alphas)
    assert (attribution.map_error is None) == bool(options)


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*EVERY_RULE, {"step_count": 1}], ids=str)
def test_linear_is_exact_under_every_rule(options):
    np.testing.assert_allclose(attributions(linear([2, -3], 5), [1, 1], [0, 0], **options), [2, -3], rtol=1e-6)


@pytest.mark.parametrize("options", [{"step_count": 1}, {"step_count": 6}, {}], ids=str)
def test_quadratic(options):
    random = np.random.default_rng(0)
    a, b, x, baseline = random.normal(size=(4, 4)), *np.float32(random.normal(size=(3, 4)))
    a = a + a.T
    function = Function(lambda x: 0.5 * np.einsum("ni,ij,nj->n", x, a, x) + x @ b, lambda x: x @ a + b)
    expected = (x - baseline) * (a @ (x + baseline) / 2 + b)
    np.testing.assert_allclose(attributions(function, x, baseline, **options), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", ACCURATE, ids=str)
def test_additive_functions_split_by_element(options):
    function = Function(
        lambda x: np.sin(x[:, 0]) + np.exp(x[:, 1]), lambda x: np.stack([np.cos(x[:, 0]), np.exp(x[:, 1])], 1)
    )
    expected = [np.sin(2), np.exp(1) - np.exp(-1)]
    np.testing.assert_allclose(attributions(function, [2, 1], [0, -1], **options), expected, rtol=0.03)


@pytest.mark.parametrize("quadrature", ["midpoint", "gauss_legendre", "adaptive"])
def test_without_biases_one_gradient_is_enough_for_open_rules(quadrature):
    """The gradient of a bias-free ReLU network is constant along a ray from 0."""
    function = rectified(0, bias=0)
    x = np.float32(np.random.default_rng(0).normal(size=12))
    options = {} if quadrature == "adaptive" else {"quadrature": quadrature, "step_count": 3}
    expected = x * function.gradient(x[None].astype(np.float64))[0]
    np.testing.assert_allclose(attributions(function, x, np.zeros(12), **options), expected, rtol=1e-5, atol=1e-6)


# --- axioms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"step_count": 512}, {}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_completeness(options, seed):
    function = rectified(seed)
    asked = question(function, *np.random.default_rng(seed).normal(size=(2, 12)))
    attribution, _ = rounds(IntegratedGradients(**options), asked, function)
    scale = max(abs(asked.output_change), 0.02 * absolute_sum(attribution.tensors))
    assert abs(attribution_sum(attribution.tensors) - asked.output_change) <= 0.05 * scale + 1e-6


@pytest.mark.parametrize("options", FIXED, ids=str)
def test_linearity_in_the_function(options):
    f, g = rectified(1), rectified(2)
    both = Function(lambda x: 2 * f.value(x) - 3 * g.value(x), lambda x: 2 * f.gradient(x) - 3 * g.gradient(x))
    ends = np.random.default_rng(1).normal(size=(2, 12))
    expected = 2 * attributions(f, *ends, **options) - 3 * attributions(g, *ends, **options)
    np.testing.assert_allclose(attributions(both, *ends, **options), expected, rtol=1e-4, atol=1e-5)


@given(scale=st.sampled_from([1e-9, 1e-3, 7.0, 1e6]), shift=st.sampled_from([-5.0, 0.0, 3.0]))
def test_scale_and_shift_of_the_score(scale, shift):
    f = rectified(5)
    g = Function(lambda x: scale * f.value(x) + shift, lambda x: scale * f.gradient(x))
    ends = np.random.default_rng(5).normal(size=(2, 12))
    expected = scale * attributions(f, *ends)
    np.testing.assert_allclose(attributions(g, *ends), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_equal_elements_get_exactly_zero(options):
    def gradient(x):
        return np.where(np.arange(12) == 3, np.nan, f.gradient(x))

    f = rectified(6)
    x, baseline = np.random.default_rng(6).normal(size=(2, 12))
    baseline[[3, 7]] = x[[3, 7]]
    tensor = attributions(Function(f.value, gradient), x, baseline, **options)
    assert tensor[3] == tensor[7] == 0
    assert np.all(np.isfinite(tensor))


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_nothing_changed_nothing_attributed(options):
    x = np.random.default_rng(7).normal(size=12)
    attribution = explain(rectified(7), x, x, **options)
    assert not attribution.tensors["x"].any()
    assert attribution.stop_reason in (StopReason.FIXED_STEPS, StopReason.CONVERGED)


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_dummies_and_symmetry(options):
    function = ridge(np.tanh, lambda z: 1 / np.cosh(z) ** 2, [1, 1, 0])
    tensor = attributions(function, [0.7, 0.7, 2], [0, 0, 0], **options)
    assert tensor[2] == 0
    assert tensor[0] == tensor[1] != 0


@pytest.mark.parametrize("quadrature", ["midpoint", "trapezoid", "gauss_legendre"])
def test_the_path_backwards_is_the_negative(quadrature):
    x, baseline = np.random.default_rng(8).normal(size=(2, 12))
    options = {"quadrature": quadrature, "step_count": 16}
    forwards = attributions(rectified(8), x, baseline, **options)
    np.testing.assert_allclose(attributions(rectified(8), baseline, x, **options), -forwards, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_the_order_of_elements_does_not_matter(options):
    f, order = rectified(9), np.random.default_rng(9).permutation(12)
    g = Function(lambda x: f.value(x[:, np.argsort(order)]), lambda x: f.gradient(x[:, np.argsort(order)])[:, order])
    x, baseline = np.random.default_rng(10).normal(size=(2, 12))
    expected = attributions(f, x, baseline, **options)[order]
    np.testing.assert_allclose(attributions(g, x[order], baseline[order], **options), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_the_shape_of_the_input_is_kept(options):
    x, baseline = np.random.default_rng(11).normal(size=(2, 3, 2, 2))
    tensor = attributions(rectified(11), x, baseline, **options)
    assert tensor.shape == (3, 2, 2) and tensor.dtype == np.float32


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_two_inputs_share_one_path(options):
    f = rectified(12)
    x, baseline = np.float32(np.random.default_rng(12).normal(size=(2, 12)))
    whole, parts = question(f, x, baseline), {"a": slice(0, 4), "b": slice(4, 12)}

    def split(tensors):
        return {name: tensors["x"][part] for name, part in parts.items()}

    def evaluate(plan):
        joined = [
            replace(
                s, **{end: {"x": np.concatenate([getattr(s, end)[name] for name in parts])} for end in ("start", "end")}
            )
            for s in plan.segments
        ]
        evaluated = f.evaluate(Plan(tuple(joined))).segments
        return Evaluation(tuple(replace(e, gradient_sums=split(e.gradient_sums)) for e in evaluated))

    asked = replace(
        whole,
        instance=replace(whole.instance, moving=split(whole.instance.moving)),
        baseline=replace(whole.baseline, moving=split(whole.baseline.moving)),
    )
    answer = IntegratedGradients(**options).plan(asked)
    while isinstance(answer, Plan):
        answer = IntegratedGradients(**options).attribution(asked, answer, evaluate(answer))
    expected = attributions(f, x, baseline, **options)
    assert {name: tensor.tolist() for name, tensor in answer.tensors.items()} == {
        name: expected[part].tolist() for name, part in parts.items()
    }


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_a_gradient_that_is_not_a_number_is_shown_and_said(options):
    def gradient(x):
        return np.where(x > 0.5, np.nan, 1.0)

    attribution = explain(Function(lambda x: x[:, 0], gradient), [1.0], [0.0], **options)
    if "left" in options.values() and options["step_count"] == 2:
        assert attribution.stop_reason is StopReason.FIXED_STEPS  # never looks beyond .5
        return
    assert attribution.stop_reason is StopReason.NON_FINITE
    assert np.isnan(attribution.tensors["x"][0])


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_same_question_same_answer(seed):
    ends = np.random.default_rng(seed).normal(size=(2, 12))
    first, second = (explain(rectified(seed % 7), *ends) for _ in range(2))
    assert first.tensors["x"].tobytes() == second.tensors["x"].tobytes()
    assert first.alphas.tobytes() == second.alphas.tobytes()


def test_infinite_scores_end_the_path():
    asked = question(steep(4, 0.5), [1.0], [0.0])
    method = IntegratedGradients()
    plan = method.plan(asked)
    bad = Evaluation(tuple(SegmentEvaluation(np.array([np.inf]), {"x": np.ones(1, np.float32)}) for _ in plan.segments))
    answer = method.attribution(asked, plan, bad)
    assert answer.stop_reason is StopReason.NON_FINITE and answer.map_error is None


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
def test_a_map_too_large_for_float32_is_not_finite(options):
    attribution = explain(linear([1e30, 2e30]), [1e20, 1e20], [0.0, 0.0], **options)
    assert attribution.stop_reason is StopReason.NON_FINITE
    assert attribution.map_error is None


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_an_infinite_end_point_is_not_finite(options):
    """log x from 0: the path's own points are finite, F(x') is not."""
    with np.errstate(divide="ignore"):
        attribution = explain(ridge(np.log, lambda z: 1 / z, [1.0]), [1.0], [0.0], **options)
    assert attribution.scores[0] == -np.inf
    assert attribution.stop_reason is StopReason.NON_FINITE
