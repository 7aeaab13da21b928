"""Plans that share forward passes: merged, evaluated, and dealt out again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from closed_form import FORWARD, GRADIENT, ClosedForm
from explainserve.plan import Differentiation, Evaluation, Plan, Rows, Segment, Selector
from explainserve.sharing import shared
from explainserve.signature import ScoreHead

POINTS = [{"x": np.random.default_rng(seed).standard_normal(3).astype(np.float32)} for seed in range(3)]
SELECTORS = [
    Selector(np.array([0]), np.ones(1, np.float32)),
    Selector(np.array([1]), np.ones(1, np.float32)),
    Selector(np.array([1]), np.full(1, 2, np.float32)),
    Selector(np.array([0, 1]), np.array([1, -1], np.float32)),
]


def segment(
    *selectors: int, end: int = 1, alphas: tuple[float, ...] = (0.25, 0.75), function: Differentiation = GRADIENT
) -> Segment:
    """From the first point to that at `end`."""
    own = tuple(replace(SELECTORS[index]) for index in selectors)  # equal, not identical
    return Segment(POINTS[0], POINTS[end], {}, function, np.array(alphas), np.full(len(alphas), 0.5), own)


def evaluate(plan: Plan) -> Evaluation:
    """Each segment as a micro-batch of its own."""
    parts = [ClosedForm().evaluate(Rows(own.function, (own,))) for own in plan.segments]
    return Evaluation(tuple(part for group in parts for part in group))


def assert_equal(found: Evaluation, expected: Evaluation) -> None:
    for own, other in zip(found.segments, expected.segments, strict=True):
        np.testing.assert_array_equal(own.scores, other.scores)
        assert own.gradient_sums.keys() == other.gradient_sums.keys()
        for name, gradient in other.gradient_sums.items():
            np.testing.assert_allclose(own.gradient_sums[name], gradient, rtol=1e-5, atol=1e-6)
        np.testing.assert_equal(own.outputs, other.outputs)


def test_rows_of_several_selectors_are_evaluated_once() -> None:
    together = shared([Plan((segment(0),)), Plan((segment(1),)), Plan((segment(3),))])

    (merged,) = together.plan.segments
    assert (together.plan.row_count, together.plan.backward_count) == (2, 6)
    assert [selector.indices.tolist() for selector in merged.selectors] == [[0], [1], [0, 1]]


def test_equal_selectors_are_evaluated_once() -> None:
    together = shared([Plan((segment(1),)), Plan((segment(2),)), Plan((segment(1),))])

    assert together.plan.backward_count == 4
    first, second, third = (own[0][0].position for own in together.pieces)
    assert first == third != second


def test_a_row_that_stands_in_several_segments_is_evaluated_by_itself() -> None:
    quadrature, node, end = segment(0, alphas=(0.25, 0.5, 1.0)), segment(1, alphas=(0.5,)), at(POINTS[1])
    others = replace(segment(0, alphas=(0.25, 0.75)), weights=np.array([1.0, 0.0]))
    plans = [Plan((own,)) for own in (quadrature, node, end, others)]
    together = shared(plans)

    assert (together.plan.row_count, together.plan.backward_count) == (4, 5)
    for plan, found in zip(plans, together.dealt(evaluate(together.plan)), strict=True):
        assert_equal(found, evaluate(plan))


def at(point: dict[str, np.ndarray]) -> Segment:
    """One row at one point, as a method without a path asks for it."""
    return replace(segment(0), start=point, end=point, alphas=np.ones(1), weights=np.ones(1))


EQUAL_ENDS = replace(segment(1), end={"x": POINTS[1]["x"].copy()})
FIXED = replace(segment(1), fixed={"id": np.array(1)})
PROBABILITY = Differentiation("y", ScoreHead.SOFTMAX, ("x",))


@pytest.mark.parametrize(
    "other",
    [
        segment(1, end=2),
        segment(1, alphas=(0.125, 0.5)),
        segment(1, function=PROBABILITY),
        segment(1, function=FORWARD),
        EQUAL_ENDS,
        FIXED,
    ],
    ids=["end", "alphas", "head", "no gradient", "another array", "fixed"],
)
def test_rows_that_differ_stay_apart(other: Segment) -> None:
    together = shared([Plan((segment(0),)), Plan((other,))])

    assert [len(own.selectors) for own in together.plan.segments] == [1, 1]


def test_score_tensors_and_selected_scores_stay_apart() -> None:
    tensors, selected = segment(function=FORWARD), segment(0, function=FORWARD)

    assert len(shared([Plan((tensors,)), Plan((selected,)), Plan((tensors,))]).plan.segments) == 2


segments = st.builds(
    segment,
    st.integers(0, 3),
    end=st.integers(0, 2),
    alphas=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=3).map(tuple),
    function=st.sampled_from([GRADIENT, FORWARD]),
)
plans = st.lists(st.lists(segments, min_size=1, max_size=4).map(lambda own: Plan(tuple(own))), min_size=1, max_size=5)


@given(plans=plans)
def test_each_plan_gets_what_it_would_get_alone(plans: list[Plan]) -> None:
    together = shared(plans)

    for plan, found in zip(plans, together.dealt(evaluate(together.plan)), strict=True):
        assert_equal(found, evaluate(plan))
    assert together.plan.row_count <= sum(plan.row_count for plan in plans)
    assert together.plan.backward_count <= sum(plan.backward_count for plan in plans)
    assert shared([together.plan]).plan.row_count == together.plan.row_count
