"""Guided Integrated Gradients (Kapishnikov et al.: Guided Integrated Gradients: An Adaptive Path Method for Removing
Noise, CVPR 2021, algorithm 1, with the bound on the distance from the straight line in place of anchors that the
authors' code has).

After step k of n the elements have gone k / n of their way on average, weighted by the length of their ways. A step
first takes elements that lag too far behind along; then those with the smallest absolute gradients go as far ahead as
they may, a fraction of all elements at a time, and the last of these batches only as far as the average asks for.
Elements with equal gradients go together, so a path does not depend on the order of the elements.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Attribution, Question, Subject
from explainserve.methods.adaptive import Displacement
from explainserve.methods.contract import FLOAT32_BYTES, Cost, Method, ReadingGuide
from explainserve.methods.quadrature import check_step_count
from explainserve.methods.rows import gradients, point
from explainserve.methods.sampling import check_option
from explainserve.methods.walk import Walk, way
from explainserve.plan import Evaluation, Plan, SegmentEvaluation, Tensors

_WORKING_ARRAYS = 32
"""Arrays of float32 of the size of the moving inputs that one step takes at most; most of its arrays are float64."""

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Position:
    """A point of the path.

    Attributes:
        progress: of each element that moves, as a share of its way, in [0, 1].
        moving: the moving inputs there.
    """

    progress: Vector
    moving: Tensors


@dataclass(frozen=True, eq=False)
class StepPlan(Plan):
    """The row of one step.

    Attributes:
        position: where its gradient is taken.
        walk: the steps before.
        displacement: of the straight line.
    """

    position: Position
    walk: Walk
    displacement: Displacement


@dataclass(frozen=True)
class GuidedIntegratedGradients(Method):
    """The gradient integrated along a path that moves first where it is small.

    Attributes:
        step_count: steps, each with one gradient, at least 1.
        fraction: share of all elements that move at a time, in (0, 1].
        max_distance: how far an element may stray from the straight line, as a share of its way, in (0, 1].

    Raises:
        InvalidRequest: STEP_COUNT_OUT_OF_RANGE, OPTION_OUT_OF_RANGE.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="path",
        units="output",
        complete=True,
        needs_baseline=True,
        deterministic=True,
        paper="Kapishnikov et al.: Guided Integrated Gradients: An Adaptive Path Method for Removing Noise, CVPR 2021, "
        "arXiv:2106.09788",
    )

    step_count: int = 200
    fraction: float = 0.25
    max_distance: float = 0.02

    def __post_init__(self) -> None:
        check_step_count("step_count", self.step_count)
        check_option("fraction", self.fraction, high=1)
        check_option("max_distance", self.max_distance, high=1)

    def cost(self, subject: Subject) -> Cost:
        """One gradient per step, of which that at the baseline is the same for every target."""
        return Cost(self.step_count, self.step_count, 1)

    def path_bytes(self, subject: Subject) -> int:
        """One step."""
        return _WORKING_ARRAYS * FLOAT32_BYTES * subject.element_count

    def plan(self, question: Question) -> Plan:
        """The baseline."""
        displacement = Displacement.of(question)
        start = Position(np.zeros(len(displacement.values)), question.start)
        return _row(question, start, Walk(), displacement)

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The next step, or the map."""
        assert isinstance(plan, StepPlan), "Not a plan of this method. This is a bug."
        (node,) = evaluation.segments
        walk = plan.walk.at(plan.walk.piece_count / self.step_count, node)
        following = self._following(question, plan, node)
        walk = walk.along(way(plan.position.moving, following.moving), gradients(node, question))
        if walk.piece_count == self.step_count:
            return walk.attribution(question)
        return _row(question, following, walk, plan.displacement)

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The map if the rest of the path was one straight step."""
        assert isinstance(upcoming, StepPlan), "Not a plan of this method. This is a bug."
        return upcoming.walk.cut_short(question, upcoming.position.moving)

    def _following(self, question: Question, plan: StepPlan, node: SegmentEvaluation) -> Position:
        """The end of a step: the same object for every method along this path, so that they share its rows."""
        step = plan.walk.piece_count + 1
        key = (self, question.target, question.baseline, step)
        return question.instance.derived(key, lambda: self._moved(question, plan, node, step))

    def _moved(self, question: Question, plan: StepPlan, node: SegmentEvaluation, step: int) -> Position:
        displacement, progress = plan.displacement, plan.position.progress
        if step == self.step_count:
            return Position(np.ones_like(progress), question.instance.moving)
        batch = 1 + math.floor(self.fraction * (displacement.changed.size - 1))
        slopes, lengths = np.abs(displacement.gradient(node)), np.abs(displacement.values)
        progress = advanced(progress, slopes, lengths, step / self.step_count, self.max_distance, batch)
        return Position(progress, _point(question, displacement, progress))


def advanced(
    progress: Vector,
    slopes: NDArray[np.floating],
    lengths: Vector,
    average: float,
    max_distance: float,
    batch: int,
) -> Vector:
    """The progress of elements after a step that ends at an average progress, weighted by lengths.

    Args:
        progress, slopes, lengths: of each element: its share of its way, its absolute gradient and the length of its
            way, shape (elements,).
        batch: elements that move at a time, at least 1; more where slopes are equal.
    """
    lowest, highest = max(average - max_distance, 0.0), min(average + max_distance, 1.0)
    progress = np.maximum(progress, lowest)
    missing = float(average * lengths.sum() - lengths @ progress)
    if missing <= 0:
        return progress
    ahead = highest - progress
    slopes = np.where(ahead > 0, np.nan_to_num(slopes, nan=np.inf), np.inf)
    room = lengths * ahead

    def room_up_to(slope: float) -> float:
        return float(room @ (slopes <= slope))

    limits = _limits(slopes, batch)
    last = min(bisect_left(limits, missing, key=room_up_to), len(limits) - 1)
    below, limit = limits[last - 1] if last else -1.0, limits[last]
    passed, whole = room_up_to(below), room_up_to(limit)
    share = (missing - passed) / (whole - passed) if whole > missing else 1.0
    return progress + ahead * np.where(slopes <= below, 1.0, share * (slopes <= limit))


def _limits(slopes: NDArray[np.floating], batch: int) -> list[float]:
    """The largest slope of each batch, ascending. Sorting is faster than a partition at several ranks."""
    ranked = np.sort(slopes)
    return [*ranked[batch - 1 : -1 : batch].tolist(), float(ranked[-1])]


def _row(question: Question, position: Position, walk: Walk, displacement: Displacement) -> StepPlan:
    return StepPlan((point(question, position.moving, question.gradient),), position, walk, displacement)


def _point(question: Question, displacement: Displacement, progress: Vector) -> Tensors:
    gone = displacement.tensors(progress, question.start)
    return {name: (start.astype(np.float64) + gone[name]).astype(start.dtype) for name, start in question.start.items()}
