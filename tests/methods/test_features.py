"""Segments: given, made by a recipe, and what they mean for instances and maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from explainserve.errors import InvalidRequest, Unsupported
from explainserve.explanation import Instance, Subject
from explainserve.methods import features
from explainserve.methods.features import GRID, check_recipe, given, made
from explainserve.signature import MapSpec


def subject(**shapes: tuple[int, ...]) -> Subject:
    """Inputs of three axes are CHW, of two HW, others have no layout."""
    layouts = {2: "HW", 3: "CHW"}
    return Subject({name: MapSpec(name, layouts.get(len(shape), "")) for name, shape in shapes.items()}, shapes)


PICTURE = np.zeros((3, 24, 32), np.float32)
PICTURE[0, :, 16:], PICTURE[1, 12:] = 1, 0.8


def test_a_grid_has_about_as_many_rectangles_as_asked_for_and_of_one_size() -> None:
    labels = features.grid(12, 24, 18)

    assert labels.max() + 1 == 18
    assert set(np.bincount(labels.reshape(-1))) == {16}
    assert [len(np.unique(labels[0])), len(np.unique(labels[:, 0]))] == [6, 3]


def test_segments_of_all_inputs_are_counted_on() -> None:
    own = made(GRID, 4, subject(picture=(3, 4, 4), row=(5,), number=()), None)

    assert own.count == 4 + 5 + 1
    assert own.labels["picture"].shape == (1, 4, 4)
    assert own.sizes.tolist() == [12] * 4 + [1] * 6
    np.testing.assert_array_equal(own.labels["row"], [4, 5, 6, 7, 8])


def test_equal_labels_are_one_segment_and_inputs_without_labels_one_more() -> None:
    labels = {"a": np.array([7, 0, 7]), "b": np.array([[7, 3]])}
    own = given(labels, subject(a=(3,), b=(4, 2), c=(6,)))

    assert own.count == 4
    assert own.labels["a"].tolist() == [2, 0, 2]
    assert own.labels["b"].tolist() == [[2, 1]]
    assert own.sizes.tolist() == [1, 4, 6, 6]


def test_absent_segments_show_the_baseline() -> None:
    own = given({"x": np.array([[0, 1, 1]])}, subject(x=(2, 3)))
    instance = Instance({"x": np.ones((2, 3), np.float32)}, {"y": np.arange(2)})
    mixed = own.mixed(np.array([False, True]), instance, {"x": np.full((2, 3), 5, np.float32)})

    assert mixed.moving["x"].tolist() == [[5, 1, 1], [5, 1, 1]]
    assert mixed.moving["x"].dtype == np.float32
    assert mixed.fixed is instance.fixed
    assert own.spread(np.array([1.0, 2.0]))["x"].tolist() == [[1, 2, 2], [1, 2, 2]]
    assert own.shared_out(np.array([1.0, 2.0]))["x"].tolist() == [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize("layout", ["CHW", "HWC", "WHC"])
@pytest.mark.parametrize("recipe", ["slic", "quickshift", "felzenszwalb"])
def test_a_recipe_follows_the_picture_in_any_layout(recipe: str, layout: str) -> None:
    pytest.importorskip("skimage")
    order = ["CHW".index(letter) for letter in layout]
    values = PICTURE.transpose(order)
    asked = Subject({"x": MapSpec("x", layout)}, {"x": values.shape})
    labels = made(recipe, 4, asked, Instance({"x": values}, {})).labels["x"]

    plane = np.broadcast_to(labels, values.shape).transpose([layout.index(letter) for letter in "CHW"])[0]
    assert set(np.unique(plane)) == set(range(plane.max() + 1))
    assert not set(np.unique(plane[:, :16])) & set(np.unique(plane[:, 16:]))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"z": np.zeros(3, np.int64)}, "SEGMENTS_INPUT_UNKNOWN"),
        ({"x": np.zeros(4, np.int64)}, "SEGMENTS_SHAPE_MISMATCH"),
        ({"x": np.zeros((1, 3), np.int64)}, "SEGMENTS_SHAPE_MISMATCH"),
        ({"x": np.zeros(3, np.float32)}, "SEGMENTS_INVALID"),
        ({"x": np.array([0, -1, 1])}, "SEGMENTS_INVALID"),
    ],
)
def test_bad_labels_are_refused(labels: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        given(labels, subject(x=(3,)))
    assert refusal.value.reason == reason


@pytest.mark.parametrize(
    ("recipe", "count", "shapes", "reason"),
    [
        ("grid", 4, {"x": (5,)}, "SEGMENTS_NEED_SPATIAL_AXES"),
        ("grid", 1, {"x": (4, 4)}, "OPTION_OUT_OF_RANGE"),
        ("grid", 17, {"x": (4, 4)}, "OPTION_OUT_OF_RANGE"),
    ],
)
def test_bad_recipes_are_refused(recipe: str, count: int, shapes: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_recipe(recipe, count, subject(**shapes))
    assert refusal.value.reason == reason


def test_a_recipe_without_its_library_is_refused_by_name(monkeypatch: Any) -> None:
    monkeypatch.setattr("explainserve.methods.superpixels.find_spec", lambda name: None)
    with pytest.raises(Unsupported) as refusal:
        check_recipe("slic", 4, subject(x=(4, 4)))
    assert (refusal.value.reason, refusal.value.metadata["library"]) == ("SEGMENTATION_NOT_INSTALLED", "scikit-image")
