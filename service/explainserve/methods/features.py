"""Features of an instance that are present or absent together: segments of its inputs.

Segments are labels that the client sends, or are made by a recipe; elements of inputs without H and W axes are each a
segment of its own. An absent segment shows the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Instance, Subject
from explainserve.methods.planes import laid_over
from explainserve.methods.superpixels import FINDERS, check_installed
from explainserve.plan import Tensors
from explainserve.signature import MapSpec, element_count

Labels = Mapping[str, NDArray[np.int32]]

GRID = "grid"
COUNTED = (GRID, "slic")
"""Recipes that take a number of segments."""
MIN_SEGMENT_COUNT = 2


@dataclass(frozen=True, eq=False)
class Features:
    """Segments of all moving inputs.

    Attributes:
        labels: by input name, int32 from 0 without gaps, with extent 1 along axes on which they do not depend.
        shapes: of the inputs.
    """

    labels: Labels
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def count(self) -> int:
        """Number of segments."""
        return 1 + max(int(labels.max()) for labels in self.labels.values())

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Elements of each segment, over all inputs."""
        total = np.zeros(self.count, np.int64)
        for name, labels in self.labels.items():
            repeats = element_count(self.shapes[name]) // labels.size
            total += repeats * np.bincount(labels.reshape(-1), minlength=self.count)
        return total

    def mixed(self, present: NDArray[np.bool_], instance: Instance, start: Tensors) -> Instance:
        """The instance with its absent segments as they are at the start.

        Args:
            present: of each segment, shape (count,).
        """
        moving = {
            name: np.where(present[self.labels[name]], values, start[name]) for name, values in instance.moving.items()
        }
        return Instance(moving, instance.fixed)

    def spread(self, values: NDArray[np.float64]) -> dict[str, NDArray[np.float32]]:
        """A map in which each element has the value of its segment."""
        return {
            name: np.broadcast_to(values.astype(np.float32)[labels], self.shapes[name])
            for name, labels in self.labels.items()
        }

    def shared_out(self, values: NDArray[np.float64]) -> dict[str, NDArray[np.float32]]:
        """A map in which the elements of a segment share its value in equal parts."""
        return self.spread(values / self.sizes)


def given(labels: Mapping[str, NDArray[np.generic]], subject: Subject) -> Features:
    """Features by a client's labels. Equal labels are one segment, in several inputs too. Elements of inputs that it
    does not name are one further segment per input. Labels are counted on without gaps.

    Raises:
        InvalidRequest: SEGMENTS_INPUT_UNKNOWN, SEGMENTS_SHAPE_MISMATCH, SEGMENTS_INVALID.
    """
    for name, array in labels.items():
        _check_labels(name, array, subject)
    names = list(labels)
    flat = [labels[name].reshape(-1) for name in names]
    found, numbers = np.unique(np.concatenate(flat), return_inverse=True)
    parts = np.split(numbers.astype(np.int32), np.cumsum([len(part) for part in flat])[:-1])
    own = {name: part.reshape(labels[name].shape) for name, part in zip(names, parts, strict=True)}
    rest = [name for name in subject.shapes if name not in labels]
    for number, name in enumerate(rest, len(found)):
        own[name] = np.full([1] * len(subject.shapes[name]), number, np.int32)
    return Features({name: own[name] for name in subject.shapes}, subject.shapes)


def made(recipe: str | None, segment_count: int | None, subject: Subject, instance: Instance | None) -> Features:
    """Features by a recipe for inputs with H and W axes, one after the other; elements of other inputs are each a
    segment.

    Args:
        segment_count: of recipes in COUNTED.
        instance: None where the recipe does not look at it.
    """
    labels, first = {}, 0
    for name, shape in subject.shapes.items():
        axes = subject.maps[name].spatial_axes
        if axes is None:
            own = np.arange(element_count(shape), dtype=np.int32).reshape(shape)
        else:
            found = _found(recipe or GRID, segment_count, subject.maps[name], shape, axes, instance)
            own = laid_over(found, subject, name)
        labels[name] = own + np.int32(first)
        first += int(own.max()) + 1
    return Features(labels, subject.shapes)


def is_found_in_the_instance(recipe: str | None) -> bool:
    """Whether the number of segments is known only when the instance is."""
    return recipe in FINDERS


def place_count(subject: Subject) -> int:
    """Most positions (H x W) of an input that has H and W axes; 0 where none has."""
    planes = (spec.spatial_axes for spec in subject.maps.values())
    shapes = subject.shapes.values()
    return max((shape[axes[0]] * shape[axes[1]] for shape, axes in zip(shapes, planes, strict=True) if axes), default=0)


def check_recipe(recipe: str | None, segment_count: int | None, subject: Subject) -> None:
    """Whether a recipe can be followed.

    Raises:
        InvalidRequest: no moving input has H and W axes (SEGMENTS_NEED_SPATIAL_AXES), or a number of segments out of
            range (OPTION_OUT_OF_RANGE).
        Unsupported: scikit-image is not installed (SEGMENTATION_NOT_INSTALLED).
    """
    if recipe is None:
        return
    places = place_count(subject)
    if not places:
        raise InvalidRequest(
            "SEGMENTS_NEED_SPATIAL_AXES",
            f"segmentation {recipe!r} needs an input with H and W axes; elements of other inputs are each a segment",
            segmentation=recipe,
        )
    if recipe in FINDERS:
        check_installed(recipe)
    if segment_count is not None and not MIN_SEGMENT_COUNT <= segment_count <= places:
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            f"segment_count is {segment_count}; expected at least {MIN_SEGMENT_COUNT} and at most H x W, {places}",
            option="segment_count",
            value=segment_count,
            min=MIN_SEGMENT_COUNT,
            max=places,
        )


def _found(
    recipe: str,
    segment_count: int | None,
    spec: MapSpec,
    shape: tuple[int, ...],
    axes: tuple[int, int],
    instance: Instance | None,
) -> NDArray[np.int32]:
    """Labels of shape (H, W), from 0 without gaps."""
    if recipe == GRID:
        return grid(shape[axes[0]], shape[axes[1]], segment_count or 0)
    assert instance is not None, "A recipe that looks at the instance was followed without one. This is a bug."
    labels = FINDERS[recipe](picture(instance.moving[spec.name], spec, axes), segment_count or 0)
    _, numbers = np.unique(labels, return_inverse=True)
    return np.asarray(numbers.reshape(labels.shape), np.int32)


def grid(height: int, width: int, count: int) -> NDArray[np.int32]:
    """Rectangles as alike as rounding allows, about `count` of them, int32, shape (height, width)."""
    rows = min(height, max(1, round((count * height / width) ** 0.5)))
    columns = min(width, max(1, round(count / rows)))
    down, across = np.arange(height) * rows // height, np.arange(width) * columns // width
    labels: NDArray[np.int32] = (down[:, None] * columns + across).astype(np.int32)
    return labels


def picture(values: NDArray[np.generic], spec: MapSpec, axes: tuple[int, int]) -> NDArray[np.float64]:
    """Shape (H, W, channels), scaled linearly so that all values together span [0, 1]."""
    plain = np.moveaxis(values.astype(np.float64), axes, (0, 1))
    low, extent = plain.min(), np.ptp(plain) or 1.0
    scaled: NDArray[np.float64] = ((plain - low) / extent).reshape(*plain.shape[:2], -1)
    return scaled


def _check_labels(name: str, labels: NDArray[np.generic], subject: Subject) -> None:
    if name not in subject.shapes:
        names = ", ".join(subject.shapes)
        raise InvalidRequest(
            "SEGMENTS_INPUT_UNKNOWN", f"no input {name!r} moves; those that do are {names}", input=name, inputs=names
        )
    shape = subject.shapes[name]
    if len(labels.shape) != len(shape) or any(own not in (1, n) for own, n in zip(labels.shape, shape, strict=True)):
        raise InvalidRequest(
            "SEGMENTS_SHAPE_MISMATCH",
            f"segments of input {name!r} have shape {list(labels.shape)}, expected {list(shape)}, with extent 1 along "
            "axes on which they do not depend",
            input=name,
            expected=list(shape),
            actual=list(labels.shape),
        )
    if labels.dtype not in (np.int32, np.int64) or labels.min() < 0:
        raise InvalidRequest(
            "SEGMENTS_INVALID",
            f"segments of input {name!r} are {labels.dtype.name} from {labels.min()}, expected int32 or int64 from 0",
            input=name,
            actual=labels.dtype.name,
            min=labels.min(),
        )
