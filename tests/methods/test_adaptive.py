"""The adaptive rule: what it spends, where it looks, when it stops, and how honest its estimate is."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explainserve.explanation import StopReason, absolute_sum, attribution_sum
from explainserve.methods import IntegratedGradients
from explainserve.plan import Evaluation, Plan, SegmentEvaluation
from methods.analytic import Function, explain, question, rectified, rounds, sigmoid, steep

NEVER = {"tolerance": 1e-12, "completeness_tolerance": 1e-12}


def random_ends(seed, size=12):
    return np.random.default_rng(seed).normal(size=(2, size))


def sums_returned(plans):
    return [len(plan.segments) for plan in plans]


@given(max_step_count=st.integers(16, 512), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_the_budget_is_used_and_never_exceeded(max_step_count, seed):
    function = rectified(seed)
    attribution = explain(function, *random_ends(seed), max_step_count=max_step_count, **NEVER)
    assert attribution.stop_reason is StopReason.MAX_STEPS
    assert len(function.alphas) == attribution.step_count <= max_step_count
    assert attribution.step_count > 0.9 * max_step_count


@given(max_step_count=st.integers(16, 512), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_no_point_is_evaluated_twice_nor_at_the_ends(max_step_count, seed):
    function = rectified(seed)
    explain(function, *random_ends(seed), max_step_count=max_step_count, **NEVER)
    assert max(Counter(function.alphas).values()) == 1
    assert min(function.alphas) > 0 and max(function.alphas) < 1


@given(max_step_count=st.integers(16, 400), seed=st.integers(0, 3))
@settings(max_examples=15)
def test_every_point_carries_its_share_of_the_path(max_step_count, seed):
    """Gradients that are unit vectors, one per row, make the map show the weights of all rows."""
    random = np.random.default_rng(seed)
    method = IntegratedGradients(max_step_count=max_step_count, **NEVER)
    count = [0]

    def sums(segment):
        total = np.zeros(400, np.float32)
        total[count[0] : count[0] + segment.row_count] = segment.weights
        count[0] += segment.row_count
        return SegmentEvaluation(random.normal(size=segment.row_count), {"x": total})

    asked = question(Function(lambda x: x.sum(1), np.ones_like), np.ones(400), np.zeros(400))
    answer, alphas = method.plan(asked), []
    while isinstance(answer, Plan):
        alphas += [alpha for segment in answer.segments for alpha in segment.alphas]
        evaluation = Evaluation(tuple(sums(segment) for segment in answer.segments))
        answer = method.attribution(asked, answer, evaluation)
    weights = answer.tensors["x"][: len(alphas)][np.argsort(alphas)].astype(np.float64)
    nodes = np.sort(alphas)
    edges = np.concatenate([[0], (nodes[1:] + nodes[:-1]) / 2, [1]])
    np.testing.assert_allclose(weights, np.diff(edges), rtol=1e-6)
    assert abs(answer.tensors["x"].sum(dtype=np.float64) - 1) < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_rounds_are_few_and_return_few_sums(seed):
    function = rectified(seed, depth=3)
    asked = question(function, *random_ends(seed))
    _, plans = rounds(IntegratedGradients(max_step_count=512, **NEVER), asked, function)
    assert [plan.row_count for plan in plans[:4]] == [8, 8, 8, 8]
    assert len(plans) <= 12
    # Single nodes first; later whole intervals at once, at most one sum each, and the ends.
    assert sum(sums_returned(plans)[:4]) == 32
    assert all(count <= 40 for count in sums_returned(plans))


def test_scores_and_gradients_of_the_pilot_choose_the_points():
    """The transition gets nearly all of the points."""
    function = steep(2000, 0.37)
    explain(function, [1.0], [0.0])
    near = [alpha for alpha in function.alphas if abs(alpha - 0.37) < 0.07]
    assert len(near) > 0.7 * len(function.alphas)


@given(noise=st.integers(0, 100))
@settings(max_examples=20)
def test_rounding_of_the_model_does_not_move_points(noise):
    """Symmetric functions have exact ties, which last digits must not decide."""

    random = np.random.default_rng(noise)
    kinks = (0.43, 0.57)
    symmetric = Function(
        lambda x: sum(np.abs(x - kink) + x for kink in kinks).sum(1),
        lambda x: sum(np.sign(x - kink) + 1 for kink in kinks),
    )
    noisy = Function(symmetric.value, lambda x: symmetric.gradient(x) * (1 + 1e-6 * random.normal(size=x.shape)))
    for function in (symmetric, noisy):
        explain(function, np.ones(6), np.zeros(6), max_step_count=48, tolerance=0.001)
    assert len(noisy.alphas) > 16
    assert symmetric.alphas == noisy.alphas


@pytest.mark.parametrize(
    ("k", "center"), [(200, 0.37), (200, 0.0371), (2000, 0.37), (20_000, 0.61803), (200_000, 0.61803), (200, 0.999)]
)
def test_steep_transitions_are_found(k, center):
    expected = sigmoid(k * (1 - center)) - sigmoid(-k * center)
    for tolerance in (0.05, 0.01):
        options = {"tolerance": tolerance, "completeness_tolerance": tolerance}
        attribution = explain(steep(k, center), [1.0], [0.0], **options)
        assert attribution.stop_reason is StopReason.CONVERGED
        assert attribution.step_count <= 128
        assert abs(attribution.tensors["x"][0] / expected - 1) < tolerance


# --- stop reasons ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_converged_means_both_tolerances(seed):
    function = rectified(seed)
    asked = question(function, *random_ends(seed))
    attribution, _ = rounds(IntegratedGradients(tolerance=0.02), asked, function)
    assert attribution.stop_reason is StopReason.CONVERGED
    assert attribution.map_error <= 0.02
    scale = max(abs(asked.output_change), 0.02 * absolute_sum(attribution.tensors))
    assert abs(attribution_sum(attribution.tensors) - asked.output_change) <= 0.05 * scale * (1 + 1e-5)


@pytest.mark.parametrize("center", [0.5, 0.3, 1e-4, 0.99999])
def test_a_jump_of_the_score_does_not_converge(center):
    function = Function(lambda x: (x[:, 0] > center).astype(float), np.zeros_like)
    attribution = explain(function, [1.0], [0.0])
    assert attribution.stop_reason is StopReason.NON_CONVERGENT
    assert attribution.step_count <= 128
    assert attribution_sum(attribution.tensors) == 0 and attribution.map_error == 0


def test_a_quantized_score_does_not_converge_and_does_not_use_up_the_budget():
    function = Function(lambda x: np.round(300 * x[:, 0]) / 300, np.zeros_like)
    attribution = explain(function, [1.0], [0.0], max_step_count=512)
    assert attribution.stop_reason is StopReason.NON_CONVERGENT
    assert attribution.step_count < 128


def test_a_tight_tolerance_ends_at_the_budget():
    attribution = explain(rectified(0), *random_ends(0), tolerance=1e-6, max_step_count=40)
    assert attribution.stop_reason is StopReason.MAX_STEPS
    assert attribution.step_count == 40


@pytest.mark.parametrize("final_after", [1, 2, 3, 5])
def test_out_of_time_the_best_map_so_far_is_the_answer(final_after):
    function = rectified(1)
    asked = question(function, *random_ends(1))
    attribution, plans = rounds(IntegratedGradients(tolerance=1e-6), asked, function, final_after=final_after)
    assert len(plans) == final_after
    assert attribution.stop_reason is StopReason.TIME_BUDGET
    assert attribution.map_error > 1e-6
    assert attribution.step_count == sum(plan.row_count for plan in plans) == len(function.alphas)
    reference = explain(rectified(1), *random_ends(1), step_count=4000).tensors["x"]
    error = np.linalg.norm(attribution.tensors["x"] - reference) / np.linalg.norm(reference)
    assert error < 1.5 / attribution.step_count


def test_out_of_time_and_converged_is_converged():
    function = steep(1, 0)
    attribution, _ = rounds(IntegratedGradients(), question(function, [1.0], [0.0]), function, final_after=2)
    assert attribution.stop_reason is StopReason.CONVERGED


# --- accuracy --------------------------------------------------------------------------------------------------------


def relative_error(tensor, reference):
    return np.linalg.norm(tensor - reference) / np.linalg.norm(reference)


def saturating(seed):
    """A sigmoid on top of a ReLU network: most of the change happens on a small part of the path."""
    inner = rectified(seed)

    def gradient(x):
        value = np.tanh(2 * inner.value(x) - 3)
        return 2 * (1 - value[:, None] ** 2) * inner.gradient(x)

    return Function(lambda x: np.tanh(2 * inner.value(x) - 3), gradient)


@pytest.fixture(scope="module")
def measured():
    """(estimated, true) errors, and the midpoint rule's, over functions and budgets."""
    triples = []
    for seed in range(12):
        for make in (rectified, saturating):
            x, baseline = random_ends(seed)
            reference = explain(make(seed), 2 * x, baseline, step_count=8192).tensors["x"]
            for n in (32, 64, 128):
                attribution = explain(make(seed), 2 * x, baseline, max_step_count=n, **NEVER)
                midpoint = explain(make(seed), 2 * x, baseline, step_count=n).tensors["x"]
                errors = relative_error(attribution.tensors["x"], reference), relative_error(midpoint, reference)
                triples.append((attribution.map_error, *errors))
    return np.array(triples)


def test_the_estimate_is_honest(measured):
    estimated, true, _ = measured[measured[:, 1] > 1e-3].T
    ratios = estimated / true
    assert np.mean((ratios >= 0.5) & (ratios <= 5)) >= 0.9
    assert 0.7 < np.median(ratios) < 2


def test_the_map_is_better_than_a_fixed_rule_of_as_many_points(measured):
    _, adaptive, midpoint = measured.T
    assert np.median(adaptive / midpoint) < 0.9
