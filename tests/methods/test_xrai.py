"""XRAI against regions that are known (golden case 19 of the reference, and the greedy order by hand)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from explainserve.errors import InvalidRequest, Unsupported
from explainserve.explanation import Attribution
from explainserve.methods import Xrai
from methods.analytic import linear, question_of, rounds

X = np.random.default_rng(5).normal(size=(2, 4, 6))
WEIGHTS = np.random.default_rng(6).normal(size=X.size)
FUNCTION = linear(list(WEIGHTS))


def explained(method: Xrai, x: Any = X, layout: str = "CHW") -> Attribution:
    asked = question_of(FUNCTION, {"x": x}, {"x": np.zeros_like(x)}, x=layout)
    return rounds(method.resolved(asked.subject), asked, FUNCTION)[0]


def masks(*places: tuple[slice, slice]) -> Any:
    found = np.zeros((len(places), 4, 6), np.bool_)
    for own, place in zip(found, places, strict=True):
        own[place] = True
    return found


LEFT, RIGHT, ALL = np.s_[:, :3], np.s_[:, 3:], np.s_[:, :]


def test_the_base_map_is_the_largest_over_channels_of_the_mean_of_black_and_white() -> None:
    found = explained(Xrai(step_count=3, segments=masks(ALL)))
    ways = [(X - end) * WEIGHTS.reshape(X.shape) for end in (X.min(), X.max())]

    np.testing.assert_allclose(found.parts["black"], ways[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.parts["white"], ways[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.parts["base"], np.mean(ways, axis=0).max(axis=0), rtol=1e-4, atol=1e-5)


def test_one_segment_has_the_mean_everywhere() -> None:
    found = explained(Xrai(step_count=2, segments=masks(ALL)))

    np.testing.assert_allclose(found.tensors["x"], np.full((4, 6), found.parts["base"].mean()), rtol=1e-5)
    assert not found.segments["x"].any()


def test_the_sum_is_that_of_the_base_map() -> None:
    found = explained(Xrai(step_count=2, segments=masks(np.s_[:2, :4], np.s_[1:, 2:5])))

    assert found.tensors["x"].sum() == pytest.approx(found.parts["base"].sum(), rel=1e-5)
    for rank in range(found.segments["x"].max() + 1):
        region = found.segments["x"] == rank
        np.testing.assert_allclose(found.tensors["x"][region], found.parts["base"][region].mean(), rtol=1e-5)


def test_the_better_segment_comes_first_and_what_it_covers_no_longer_counts() -> None:
    """Right has mean 2. Without it, what is left of all has mean 1, and what no segment reaches is nothing."""
    base = np.where(np.arange(6) < 3, 1.0, 2.0) * np.ones((4, 1))
    found = explained(Xrai(segments=masks(ALL, RIGHT), base_map=base))

    np.testing.assert_array_equal(found.tensors["x"], base)
    np.testing.assert_array_equal(found.segments["x"], np.where(base == 2, 0, 1))
    assert found.step_count == 1


def test_what_no_segment_reaches_is_a_region() -> None:
    base = np.arange(24.0).reshape(4, 6)
    found = explained(Xrai(segments=masks(LEFT), base_map=base))

    np.testing.assert_allclose(found.tensors["x"][RIGHT], base[RIGHT].mean())
    np.testing.assert_array_equal(found.segments["x"][RIGHT], 0)


def test_a_base_map_of_the_inputs_shape_counts_by_its_largest_channel() -> None:
    base = np.random.default_rng(7).normal(size=X.shape)
    found = explained(Xrai(segments=masks(ALL), base_map=base))

    assert found.tensors["x"][0, 0] == pytest.approx(base.max(axis=0).mean(), rel=1e-5)


def test_the_server_makes_segments_with_scikit_image() -> None:
    pytest.importorskip("skimage")
    found = explained(Xrai(step_count=2))

    assert found.tensors["x"].sum() == pytest.approx(found.parts["base"].sum(), rel=1e-4)
    assert found.segments["x"].min() == 0


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Xrai(segments=np.ones((1, 4, 5), np.bool_)), "SEGMENTS_SHAPE_MISMATCH"),
        (Xrai(segments=np.ones((0, 4, 6), np.bool_)), "SEGMENTS_SHAPE_MISMATCH"),
        (Xrai(segments=np.ones((1, 4, 6), np.int32)), "SEGMENTS_INVALID"),
        (Xrai(segments=masks(ALL), base_map=np.ones((6, 4))), "BASE_MAP_INVALID"),
    ],
)
def test_bad_options_are_refused(method: Xrai, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        explained(method)
    assert refused.value.reason == reason


def test_no_steps_are_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        Xrai(step_count=0)
    assert refused.value.reason == "STEP_COUNT_OUT_OF_RANGE"


def test_an_input_without_a_grid_is_refused() -> None:
    with pytest.raises(Unsupported) as refused:
        explained(Xrai(), layout="")
    assert refused.value.reason == "NO_SPATIAL_AXES"


def test_steps_of_a_given_base_map_are_refused() -> None:
    given = Xrai(segments=masks(ALL), base_map=np.ones((4, 6)))
    with pytest.raises(InvalidRequest) as refused:
        Xrai(segments=masks(ALL), base_map=np.ones((4, 6)), step_count=100)

    assert (refused.value.reason, refused.value.metadata["option"]) == ("OPTION_WITHOUT_EFFECT", "step_count")
    assert (given.step_count, Xrai().step_count) == (None, 100)
