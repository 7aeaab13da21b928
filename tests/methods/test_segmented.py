"""Methods over segments against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, StopReason
from explainserve.methods import FeatureAblation
from explainserve.methods.segmented import Segmented
from methods.analytic import Function, question_of, rounds, values_of

W = np.array([2.0, -3.0, 0.5, 1.0])
X, START = np.array([1.0, 1.0, 4.0, -2.0]), np.array([0.5, 0.0, 1.0, 1.0])
LINEAR = values_of(lambda rows: rows @ W + 7)
TOTAL = values_of(lambda rows: rows.sum(axis=1))
METHODS: list[type[Segmented]] = [FeatureAblation]


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

    np.testing.assert_allclose(found.tensors["x"][1], 0, atol=1e-6)
    np.testing.assert_allclose(found.tensors["x"][0], found.tensors["x"][2], rtol=1e-6)


@pytest.mark.parametrize("kind", METHODS)
def test_maps_do_not_depend_on_rounds(kind: type[Segmented], monkeypatch: Any) -> None:
    random = np.random.default_rng(2)
    matrix = random.normal(size=(6, 6))
    function = values_of(lambda rows: np.tanh(((rows @ matrix) * rows).sum(axis=1)))
    x = random.normal(size=6)
    whole = explain(kind(), function, x, np.zeros(6))
    monkeypatch.setattr("explainserve.methods.perturbation.round_size", lambda count: 5)
    parts = explain(kind(), function, x, np.zeros(6))

    np.testing.assert_array_equal(whole.tensors["x"], parts.tensors["x"])


@pytest.mark.parametrize("kind", METHODS)
def test_time_that_ends_leaves_a_map_of_what_is_done(kind: type[Segmented], monkeypatch: Any) -> None:
    monkeypatch.setattr("explainserve.methods.perturbation.round_size", lambda count: 2)
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


@pytest.mark.parametrize("kind", [FeatureAblation])
def test_segments_that_are_found_are_refused_where_each_costs_rows(kind: type[Segmented]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        explain(kind(segmentation="quickshift"), LINEAR, X, START)
    assert refusal.value.reason == "SEGMENTATION_UNSUITABLE"
