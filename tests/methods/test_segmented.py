"""Methods over segments against closed forms."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, StopReason
from explainserve.methods import FeatureAblation, KernelShap, Lime, ShapleyValueSampling
from explainserve.methods.kernel_shap import pairs_of, shares
from explainserve.methods.segmented import Segmented
from explainserve.methods.shapley_value_sampling import Walks
from methods.analytic import Function, question_of, rounds, values_of

W = np.array([2.0, -3.0, 0.5, 1.0])
X, START = np.array([1.0, 1.0, 4.0, -2.0]), np.array([0.5, 0.0, 1.0, 1.0])
LINEAR = values_of(lambda rows: rows @ W + 7)
TOTAL = values_of(lambda rows: rows.sum(axis=1))
METHODS: list[type[Segmented]] = [FeatureAblation, KernelShap, ShapleyValueSampling, Lime]
SHAPLEY: list[type[Segmented]] = [KernelShap, ShapleyValueSampling]


def explain(method: Segmented, function: Function, x: Any, start: Any, **options: Any) -> Attribution:
    """By name of the input, or of the only one; what is evaluated is within the cost."""
    inputs, starts = ({"x": side} if isinstance(side, np.ndarray) else side for side in (x, start))
    asked = question_of(function, inputs, starts, picture="HW")
    own = method.resolved(asked.subject)
    found, plans = rounds(own, asked, function, **options)
    cost, rows = own.cost(asked.subject), sum(plan.row_count for plan in plans)
    assert rows <= cost.max_forward_rows and (options or cost.min_forward_rows <= rows)
    assert found.step_count == rows
    return found


def test_ablation_of_a_linear_function() -> None:
    found = explain(FeatureAblation(), LINEAR, X, START)

    np.testing.assert_allclose(found.tensors["x"], W * (X - START), rtol=1e-6)
    assert found.segments["x"].tolist() == [0, 1, 2, 3]


def test_ablation_gives_each_element_the_value_of_its_segment() -> None:
    found = explain(FeatureAblation(segments={"x": np.array([4, 1, 4, 4])}), LINEAR, X, START)
    parts = W * (X - START)

    of_rest = parts[0] + parts[2] + parts[3]
    np.testing.assert_allclose(found.tensors["x"], [of_rest, parts[1], of_rest, of_rest], rtol=1e-6)
    assert found.segments["x"].tolist() == [1, 0, 1, 1]


def test_ablation_over_several_inputs() -> None:
    x = {"picture": np.ones((4, 4)), "row": np.arange(3.0)}
    found = explain(FeatureAblation(segment_count=4), TOTAL, x, {k: np.zeros_like(v) for k, v in x.items()})

    np.testing.assert_allclose(found.tensors["picture"], 4)
    np.testing.assert_allclose(found.tensors["row"], [0, 1, 2])


@pytest.mark.parametrize("kind", METHODS)
def test_unused_segments_get_nothing_and_equal_ones_the_same(kind: type[Segmented]) -> None:
    function = values_of(lambda rows: rows[:, 0] * rows[:, 2] + np.maximum(rows[:, 0], rows[:, 2]))
    found = explain(kind(), function, np.array([3.0, 5.0, 3.0]), np.zeros(3))

    tolerance = 0.6 if kind is Lime else 1e-5  # its regression is biased by the penalty and the draw
    np.testing.assert_allclose(found.tensors["x"][1], 0, atol=tolerance)
    np.testing.assert_allclose(found.tensors["x"][0], found.tensors["x"][2], atol=tolerance)


@pytest.mark.parametrize("kind", METHODS)
def test_maps_do_not_depend_on_rounds(kind: type[Segmented], monkeypatch: Any) -> None:
    random = np.random.default_rng(2)
    matrix = random.normal(size=(6, 6))
    function = values_of(lambda rows: np.tanh(((rows @ matrix) * rows).sum(axis=1)))
    x = random.normal(size=6)
    whole = explain(kind(), function, x, np.zeros(6))
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 5)
    parts = explain(kind(), function, x, np.zeros(6))

    np.testing.assert_allclose(whole.tensors["x"], parts.tensors["x"], rtol=1e-6)


@pytest.mark.parametrize("kind", METHODS)
def test_time_that_ends_leaves_a_map_of_what_is_done(kind: type[Segmented], monkeypatch: Any) -> None:
    monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count: 2)
    found = explain(kind(), LINEAR, X, START, final_after=1)

    assert (found.step_count, found.stop_reason) == (2, StopReason.TIME_BUDGET)
    assert np.isfinite(found.tensors["x"]).all()


@pytest.mark.parametrize("kind", METHODS)
def test_a_map_that_is_not_finite_says_so(kind: type[Segmented]) -> None:
    broken = values_of(lambda rows: np.where(rows.sum(axis=1) > 5, rows.sum(axis=1), np.nan))
    found = explain(kind(), broken, np.array([2.0, 2.0, 2.0]), np.zeros(3))

    assert (found.stop_reason, found.map_error) == (StopReason.NON_FINITE, None)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"segments": {"picture": np.zeros((4, 4), np.int64)}, "segmentation": "grid"}, "SEGMENTS_CONFLICT"),
        ({"segments": {"picture": np.zeros((4, 4), np.int64)}, "segment_count": 3}, "SEGMENTS_CONFLICT"),
        ({"segments": {"picture": np.zeros((4, 5), np.int64)}}, "SEGMENTS_SHAPE_MISMATCH"),
        ({"segmentation": "grid", "segment_count": 1}, "OPTION_OUT_OF_RANGE"),
    ],
)
def test_bad_segments_are_refused(kind: type[Segmented], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        explain(kind(**options), TOTAL, {"picture": np.ones((4, 4))}, {"picture": np.zeros((4, 4))})
    assert refusal.value.reason == reason


@pytest.mark.parametrize("method", [FeatureAblation(), ShapleyValueSampling(sample_count=1)])
def test_sets_of_many_segments_are_not_held(method: Segmented) -> None:
    """All sets of 20,000 segments take 400 MB, or 50 packed."""
    count = 20_000
    asked = question_of(TOTAL, {"x": np.ones(count)}, {"x": np.zeros(count)})
    tracemalloc.start()
    try:
        sets = method.perturbations(asked)
        rows = [sets.instance(index).moving["x"].sum() for index in (0, 1, count - 2)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < min(20e6, method.path_bytes(asked.subject))
    assert rows == ([count - 1] * 3 if isinstance(method, FeatureAblation) else [1, 2, count - 1])


def test_walks_find_the_sets_that_orders_have_in_common() -> None:
    walks = Walks.along(np.array([[0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 0, 1]]))

    present = [np.flatnonzero(own).tolist() for own in walks.present(0, walks.count)]
    assert present == [[0], [0, 1], [0, 1, 2], [1], [0, 1, 3], [3], [2, 3], [0, 2, 3]]
    assert walks.steps.tolist() == [[0, 1, 2], [3, 1, 4], [5, 6, 7]]


@pytest.mark.parametrize("kind", [FeatureAblation, ShapleyValueSampling])
def test_segments_that_are_found_are_refused_where_each_costs_rows(kind: type[Segmented]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        explain(kind(segmentation="quickshift"), LINEAR, X, START)
    assert refusal.value.reason == "SEGMENTATION_UNSUITABLE"


@pytest.mark.parametrize("kind", SHAPLEY)
@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (lambda rows: rows.min(axis=1), [1.0, 3.0], [0.5, 0.5]),
        (lambda rows: rows.max(axis=1), [1.0, 3.0], [0.5, 2.5]),
        (lambda rows: rows[:, 0] ** 2 * rows[:, 1], [2.0, 3.0], [6, 6]),
        (lambda rows: rows.prod(axis=1), [2.0, 3.0, 5.0], [10, 10, 10]),
        (lambda rows: rows @ W + 7, X.tolist(), (W * X).tolist()),
    ],
)
def test_shapley_values_are_exact_where_all_is_covered(
    kind: type[Segmented], function: Any, x: list[float], expected: list[float]
) -> None:
    found = explain(kind(), values_of(function), np.array(x), np.zeros(len(x)))

    np.testing.assert_allclose(found.tensors["x"], expected, rtol=1e-6, atol=1e-7)
    assert found.standard_errors["x"].tolist() == [0] * len(x)
    assert found.map_error == 0


@pytest.mark.parametrize("count", [5, 8, 11])
def test_kernel_shap_of_all_subsets_is_exact(count: int) -> None:
    """Against the definition, over a function without structure."""
    table = np.random.default_rng(count).normal(size=2**count)
    bits = 2 ** np.arange(count)
    function = values_of(lambda rows: table[(rows.astype(int) @ bits)])
    found = explain(KernelShap(), function, np.ones(count), np.zeros(count))

    assert found.step_count == 2**count - 2
    sizes = np.array([value.bit_count() for value in range(2**count)])
    factorial = np.cumprod([1.0, *range(1, count + 1)])
    for i in range(count):
        without = np.flatnonzero((np.arange(2**count) >> i) % 2 == 0)
        weight = factorial[sizes[without]] * factorial[count - 1 - sizes[without]] / factorial[count]
        exact = weight @ (table[without + bits[i]] - table[without])
        np.testing.assert_allclose(found.tensors["x"][i], exact, rtol=1e-5, atol=1e-6)


def test_kernel_shap_of_a_linear_function_from_few_samples() -> None:
    """The regression is right about a function that is linear whatever the samples, and its sum is held."""
    weights = np.random.default_rng(1).normal(size=40)
    found = explain(KernelShap(sample_count=120), values_of(lambda rows: rows @ weights), np.ones(40), np.zeros(40))

    np.testing.assert_allclose(found.tensors["x"], weights, rtol=1e-5, atol=1e-6)
    assert found.fit is not None and found.fit.r_squared == pytest.approx(1)
    assert found.step_count == 120


@pytest.mark.parametrize("kind", SHAPLEY)
def test_shapley_values_sum_to_the_change_and_are_shared_out(kind: type[Segmented]) -> None:
    function = values_of(lambda rows: np.tanh(rows).sum(axis=1) * rows[:, 0] + np.cos(rows[:, 5]))
    labels = np.array([0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9])
    x = np.linspace(0.1, 1.2, 12)
    found = explain(kind(segments={"x": labels}, sample_count=30), function, x, np.zeros(12))  # type: ignore[call-arg]

    change = function.value(x[None])[0] - function.value(np.zeros((1, 12)))[0]
    np.testing.assert_allclose(found.tensors["x"].sum(), change, rtol=1e-5)
    assert found.tensors["x"][0] == found.tensors["x"][1]


def test_sampled_shapley_values_within_standard_errors() -> None:
    """Of a product of six variables each has a sixth."""
    function = values_of(lambda rows: rows.prod(axis=1))
    found = explain(ShapleyValueSampling(sample_count=400), function, np.full(6, 1.5), np.full(6, 0.5))
    error = found.standard_errors["x"]

    assert (error > 0).all()
    assert (np.abs(found.tensors["x"] - (1.5**6 - 0.5**6) / 6) <= 4 * error).all()


@pytest.mark.parametrize("kind", [KernelShap, ShapleyValueSampling, Lime])
def test_samples_depend_on_the_seed(kind: type[Segmented]) -> None:
    function = values_of(lambda rows: np.tanh(rows.sum(axis=1)) * rows[:, 3])

    def map_of(seed: int) -> Any:
        method = kind(sample_count=60, seed=seed)  # type: ignore[call-arg]
        return explain(method, function, np.ones(14), np.zeros(14)).tensors["x"]

    np.testing.assert_array_equal(map_of(1), map_of(1))
    assert np.abs(map_of(1) - map_of(2)).max() > 1e-4


@pytest.mark.parametrize("count", range(2, 15))
def test_sizes_of_sets_get_samples_by_their_weight(count: int) -> None:
    every = 2 ** (count - 1) - 1
    assert sum(pairs_of(count, size) for size in range(1, count // 2 + 1)) == every
    for pairs in {min(pairs, every) for pairs in (1, 2, 3, every // 2 + 1, every)}:
        taken = shares(count, pairs)
        assert sum(taken.values()) == pairs
        assert all(0 <= own <= pairs_of(count, size) for size, own in taken.items())


def test_lime_is_a_weighted_ridge_regression_with_the_authors_kernel() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    count = 20
    weights = np.random.default_rng(4).normal(size=count)
    function = values_of(lambda rows: np.sin(rows @ weights))
    sets: list[Any] = []

    def value(rows: Any) -> Any:
        sets.append(rows)
        return function.value(rows)

    found = explain(Lime(sample_count=200, ridge=0.7), values_of(value), np.ones(count), np.zeros(count))
    present = np.concatenate([sets[0], *sets[2:]])  # the instance, and not the baseline
    distance = 1 - np.sqrt(present.mean(axis=1))
    kernel = np.sqrt(np.exp(-(distance**2) / 0.25**2))
    fit = linear_model.Ridge(alpha=0.7).fit(present, function.value(present), kernel)

    np.testing.assert_allclose(found.tensors["x"], fit.coef_, rtol=1e-4, atol=1e-6)
    assert found.fit is not None
    assert found.fit.intercept == pytest.approx(fit.intercept_)
    assert found.fit.r_squared == pytest.approx(fit.score(present, function.value(present), kernel))


def test_standard_errors_of_lime_are_white_s_with_the_intercept_in_the_design() -> None:
    count, penalty = 14, 0.7
    sets: list[Any] = []

    def value(rows: Any) -> Any:
        sets.append(rows)
        return np.sin(rows @ np.linspace(0.2, 2, count))

    found = explain(Lime(sample_count=40, ridge=penalty), values_of(value), np.ones(count), np.zeros(count))
    design = np.concatenate([sets[0], *sets[2:]])
    assert len(design) == 40  # no set was drawn twice
    weights = np.sqrt(np.exp(-(((1 - np.sqrt(design.mean(axis=1))) / 0.25) ** 2)))
    design, scores = np.column_stack([design, np.ones(40)]), value(design)
    bread = np.linalg.inv(design.T @ np.diag(weights) @ design + penalty * np.diag([1] * count + [0]))
    residuals = scores - design @ bread @ design.T @ (weights * scores)
    meat = sum(np.outer(x, x) * (w * e) ** 2 for x, w, e in zip(design, weights, residuals, strict=True))
    covariance = bread @ meat @ bread * 40 / (40 - count - 1)

    errors = np.sqrt(np.diag(covariance)[:count])
    np.testing.assert_allclose(found.standard_errors["x"], errors, rtol=1e-4)
    length = np.linalg.norm(found.tensors["x"])
    assert found.map_error == pytest.approx(np.linalg.norm(errors) / length, rel=1e-4)


def test_repeats_of_a_sample_count_as_samples_in_its_standard_errors() -> None:
    """All eight sets are drawn again and again: 16 times the samples have about a quarter of the errors."""
    function = values_of(lambda rows: rows[:, 0] * rows[:, 1] + np.maximum(rows[:, 1], rows[:, 2]))

    def errors(sample_count: int) -> Any:
        return explain(Lime(sample_count=sample_count, ridge=0), function, np.ones(3), np.zeros(3)).standard_errors["x"]

    np.testing.assert_allclose(errors(16000) / errors(1000), 1 / 4, rtol=0.1)


def test_standard_errors_of_kernel_shap_with_the_sum_eliminated() -> None:
    """Against a regression without the last segment, whose value is what the others leave of the sum."""
    count = 8
    table = np.random.default_rng(3).normal(size=2**count)
    rows_seen: list[Any] = []

    def value(rows: Any) -> Any:
        rows_seen.append(rows)
        return table[rows.astype(int) @ (2 ** np.arange(count))]

    found = explain(KernelShap(sample_count=100), values_of(value), np.ones(count), np.zeros(count))
    sets = np.concatenate(rows_seen[2:])
    sizes, full, empty = sets.sum(axis=1).astype(int), table[-1], table[0]
    scores = value(sets) - empty - sets[:, -1] * (full - empty)
    of_size = np.array([(sizes == size).sum() for size in sizes])
    weights = (count - 1) / (sizes * (count - sizes)) / of_size
    design = sets[:, :-1] - sets[:, -1:]
    bread = np.linalg.inv(design.T @ np.diag(weights) @ design)
    residuals = scores - design @ bread @ design.T @ (weights * scores)
    covariance = np.zeros((count - 1, count - 1))
    for size in range(1, count // 2 + 1):
        pairs = [
            sum(bread @ design[i] * weights[i] * residuals[i] for i in (first, first + 1))
            for first in range(0, len(sets), 2)
            if size in (sizes[first], sizes[first + 1])
        ]
        covered = len(pairs) / pairs_of(count, size)
        covariance += (1 - covered) * len(pairs) * np.cov(np.array(pairs).T)
    covariance *= 50 / (50 - count + 1)

    errors = np.sqrt([*np.diag(covariance), covariance.sum()])
    np.testing.assert_allclose(found.standard_errors["x"], errors, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "sample_count", "count"), [(KernelShap, 100, 8), (KernelShap, 400, 20), (Lime, 100, 12), (Lime, 400, 20)]
)
def test_standard_errors_are_the_scatter_over_seeds(kind: Any, sample_count: int, count: int) -> None:
    """Of 40 seeds: the root mean squares over segments have themselves an error of some percent."""
    matrix = np.random.default_rng(6).normal(size=(count, count)) / np.sqrt(count)
    function = values_of(lambda rows: np.tanh(rows @ matrix).sum(axis=1))
    found = [
        explain(kind(sample_count=sample_count, seed=seed), function, np.ones(count), np.zeros(count))
        for seed in range(40)
    ]
    scatter = np.var([own.tensors["x"] for own in found], axis=0, ddof=1)
    errors = np.square([own.standard_errors["x"] for own in found])

    assert 0.8 < np.sqrt(errors.mean() / scatter.mean()) < 1.25


@pytest.mark.parametrize("method", [KernelShap(sample_count=20), Lime(sample_count=15)])
def test_too_few_samples_tell_no_standard_errors(method: Segmented) -> None:
    found = explain(method, values_of(lambda rows: rows.prod(axis=1)), np.full(14, 1.1), np.zeros(14))

    assert (found.map_error, found.standard_errors) == (None, {})


def test_kernel_shap_that_time_ended_before_all_sizes_tells_no_standard_errors(monkeypatch: Any) -> None:
    """The nine pairs of one segment come first, and then one of each of the three other sizes."""
    function = values_of(lambda rows: np.tanh(rows.sum(axis=1)))
    found = []
    for rows in (22, 24):
        monkeypatch.setattr("explainserve.methods.sampling.round_size", lambda count, own=rows: own)
        found.append(explain(KernelShap(), function, np.ones(9), np.zeros(9), final_after=1))
    early, late = found

    assert (early.step_count, early.map_error, early.standard_errors) == (22, None, {})
    assert late.step_count == 24
    assert late.map_error is not None and late.map_error > 0


def test_lime_of_a_linear_function_without_penalty() -> None:
    found = explain(Lime(ridge=0.0), LINEAR, X, START)

    np.testing.assert_allclose(found.tensors["x"], W * (X - START), rtol=1e-5)
    assert found.fit is not None and found.fit.r_squared == pytest.approx(1)
    assert found.fit.intercept == pytest.approx(W @ START + 7)


def test_a_regression_on_scores_that_do_not_vary_has_no_r_squared() -> None:
    found = explain(KernelShap(), values_of(lambda rows: np.full(len(rows), 2.0)), X, START)

    assert found.fit is not None and found.fit.r_squared is None
    np.testing.assert_allclose(found.tensors["x"], 0)


@pytest.mark.parametrize(
    ("kind", "options", "count", "reason"),
    [
        (KernelShap, {"sample_count": 1}, 4, "SAMPLE_COUNT_OUT_OF_RANGE"),
        (KernelShap, {"seed": -1}, 4, "SEED_OUT_OF_RANGE"),
        (KernelShap, {}, 1, "SEGMENT_COUNT_OUT_OF_RANGE"),
        (KernelShap, {}, 1025, "SEGMENT_COUNT_OUT_OF_RANGE"),
        (ShapleyValueSampling, {"sample_count": 0}, 4, "SAMPLE_COUNT_OUT_OF_RANGE"),
        (ShapleyValueSampling, {}, 1, "SEGMENT_COUNT_OUT_OF_RANGE"),
        (Lime, {"sample_count": 1}, 4, "SAMPLE_COUNT_OUT_OF_RANGE"),
        (Lime, {"sample_count": 65537}, 4, "SAMPLE_COUNT_OUT_OF_RANGE"),
        (ShapleyValueSampling, {"sample_count": 65537}, 4, "SAMPLE_COUNT_OUT_OF_RANGE"),
        (Lime, {"kernel_width": 0.0}, 4, "OPTION_OUT_OF_RANGE"),
        (Lime, {"ridge": -1.0}, 4, "OPTION_OUT_OF_RANGE"),
        (Lime, {}, 1025, "SEGMENT_COUNT_OUT_OF_RANGE"),
    ],
)
def test_bad_options_are_refused(kind: type[Segmented], options: dict[str, Any], count: int, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        explain(kind(**options), TOTAL, np.ones(count), np.zeros(count))
    assert refusal.value.reason == reason
