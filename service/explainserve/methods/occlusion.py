"""Occlusion (Zeiler, Fergus: Visualizing and understanding convolutional networks, 2014, section 4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Instance, Question, Subject
from explainserve.methods.contract import Cost, ReadingGuide
from explainserve.methods.perturbation import Perturbation, Perturbations, Scores

DEFAULT_WINDOWS = 8
"""Of them stand side by side."""


@dataclass(frozen=True)
class Occlusion(Perturbation):
    """F(x) minus F of the instance with a window replaced by the baseline, for each window; a map of all of them.

    Windows run along H and W, or along the last axis of inputs without these, and cover all other axes. Of several
    inputs one shows a window, the others stay as they are.

    Attributes:
        window: extents; two are of inputs with H and W, one is of the others. () for an eighth of each input.
        stride: likewise; at most the window's extents, so that no element is left out. () for half the window.
        aggregation: "mean" over the windows that cover an element, or "sum".

    Raises:
        InvalidRequest: OPTION_OUT_OF_RANGE, WINDOW_MISMATCH.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="perturbation",
        units="output",
        complete=False,
        needs_baseline=True,
        deterministic=True,
        tier="T0",
        paper="Zeiler, Fergus: Visualizing and understanding convolutional networks, ECCV 2014, arXiv:1311.2901",
    )

    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    aggregation: str = "mean"

    def __post_init__(self) -> None:
        if self.stride and len(self.stride) != len(self.window):
            raise InvalidRequest(
                "WINDOW_MISMATCH",
                f"stride {list(self.stride)} needs a window of as many extents, got {list(self.window)}",
                window=list(self.window),
                stride=list(self.stride),
            )

    def resolved(self, subject: Subject) -> Self:
        """With window and stride, where they are the same for all inputs."""
        grids = [self._grid(subject, name) for name in subject.shapes]
        if self.window and not any(len(grid.axes) == len(self.window) for grid in grids):
            raise InvalidRequest(
                "WINDOW_MISMATCH",
                f"window {list(self.window)} has {len(self.window)} extents; inputs have windows along "
                f"{' or '.join(sorted({str(len(grid.axes)) for grid in grids}))} axes",
                window=list(self.window),
            )
        windows = {(grid.window, grid.stride) for grid in grids}
        if len(windows) > 1:
            return self
        ((window, stride),) = windows
        return replace(self, window=window, stride=stride)

    def cost(self, subject: Subject) -> Cost:
        """One row per window."""
        return Cost.fixed(forward_rows=sum(self._grid(subject, name).count for name in subject.shapes))

    def perturbations(self, question: Question) -> Perturbations:
        """The windows of all inputs."""
        grids = {name: self._grid(question.subject, name) for name in question.instance.moving}
        return _Occluded(question, grids, self.aggregation)

    def _grid(self, subject: Subject, name: str) -> _Grid:
        shape = subject.shapes[name]
        axes = subject.maps[name].spatial_axes or tuple(range(len(shape))[-1:])
        extents = tuple(shape[axis] for axis in axes)
        own = len(self.window) == len(axes)
        window = self.window if own else tuple(-(-extent // DEFAULT_WINDOWS) for extent in extents)
        stride = self.stride if own and self.stride else tuple(-(-extent // 2) for extent in window)
        _check("window", window, extents)
        _check("stride", stride, window)
        return _Grid(shape, axes, window, stride)


@dataclass(frozen=True)
class _Grid:
    """Windows on one input.

    Attributes:
        shape: of the input.
        axes: along which windows run.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def count(self) -> int:
        return prod(map(len, self.starts))

    @cached_property
    def starts(self) -> tuple[NDArray[np.int64], ...]:
        """First positions of windows along each axis; the last window ends with the input."""
        return tuple(
            np.append(np.arange(0, self.shape[axis] - width, step), self.shape[axis] - width)
            for axis, width, step in zip(self.axes, self.window, self.stride, strict=True)
        )

    def windows(self) -> Iterator[tuple[slice, ...]]:
        for corner in product(*(starts.tolist() for starts in self.starts)):
            place = [slice(None)] * len(self.shape)
            for axis, start, width in zip(self.axes, corner, self.window, strict=True):
                place[axis] = slice(start, start + width)
            yield tuple(place)

    def accumulated(self, values: Scores) -> Scores:
        """For each element the sum over windows that cover it, in the input's shape; fewer values are of the first
        windows."""
        total = np.zeros(self.count)
        total[: len(values)] = values
        total = total.reshape([len(starts) for starts in self.starts])
        for position, (axis, starts) in enumerate(zip(self.axes, self.starts, strict=True)):
            place = np.arange(self.shape[axis])[:, None]
            covers = (place >= starts) & (place < starts + self.window[position])
            total = np.moveaxis(np.tensordot(covers.astype(np.float64), total, (1, position)), 0, position)
        others = tuple(axis for axis in range(len(self.shape)) if axis not in self.axes)
        order = np.argsort(self.axes)
        return np.broadcast_to(np.expand_dims(total.transpose(order), others), self.shape)


@dataclass(frozen=True, eq=False)
class _Occluded(Perturbations):
    question: Question
    grids: dict[str, _Grid]
    aggregation: str

    @cached_property
    def windows(self) -> list[tuple[str, tuple[slice, ...]]]:
        return [(name, window) for name, grid in self.grids.items() for window in grid.windows()]

    @property
    def count(self) -> int:
        return len(self.windows)

    def instance(self, index: int) -> Instance:
        name, window = self.windows[index]
        instance, start = self.question.instance, self.question.start

        def make() -> Instance:
            values = instance.moving[name].copy()
            values[window] = start[name][window]
            return Instance({**instance.moving, name: values}, instance.fixed)

        extents = tuple((place.start, place.stop) for place in window)
        return instance.derived(("occluded", self.question.baseline, name, extents), make)

    def attribution(self, scores: Scores) -> Attribution:
        drops = self.question.instance_output_value - scores
        tensors, first = {}, 0
        for name, grid in self.grids.items():
            own = drops[first : first + grid.count]
            tensors[name] = self._aggregated(grid, own).astype(np.float32)
            first += grid.count
        return Attribution(tensors, step_count=len(scores)).checked()

    def _aggregated(self, grid: _Grid, drops: Scores) -> Scores:
        total = grid.accumulated(drops)
        return total if self.aggregation == "sum" else total / np.maximum(1, grid.accumulated(np.ones_like(drops)))


def _check(option: str, values: tuple[int, ...], limits: tuple[int, ...]) -> None:
    for value, limit in zip(values, limits, strict=True):
        if not 1 <= value <= limit:
            raise InvalidRequest(
                "OPTION_OUT_OF_RANGE",
                f"{option} {list(values)} is not between 1 and {list(limits)}",
                option=option,
                value=value,
                min=1,
                max=limit,
            )
