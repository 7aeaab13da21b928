"""Blur Integrated Gradients (Xu, Venugopalan, Sundararajan: Attribution in Scale and Space, CVPR 2020, equation 5).

The path is a chain of chords between blurs of the instance, from the strongest to none. Each chord gets the gradient at
its middle, and the way along it is the exact difference of the two blurs: the derivative by the standard deviation is
never needed, and a linear function is explained exactly by any number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from explainserve.blur import gaussian_blur
from explainserve.errors import Unsupported
from explainserve.explanation import Attribution, Instance, Question, Subject
from explainserve.methods.contract import FLOAT32_BYTES, WORKING_ARRAYS, Cost, Method, Needs, ReadingGuide
from explainserve.methods.quadrature import check_step_count
from explainserve.methods.rows import gradients, point
from explainserve.methods.sampling import MIN_ROUND, check_option, next_round, round_size
from explainserve.methods.walk import Walk, way
from explainserve.plan import Evaluation, Plan, Segment

MAX_SIGMA = 1000

_SHARES: dict[str, Callable[[float], float]] = {"linear": lambda left: left, "variance": math.sqrt}
"""Spacing -> standard deviation as a share of the strongest, by what is left of the path, in [0, 1]."""

_MIDDLE, _WHOLE = np.array([0.5]), np.ones(1)


@dataclass(frozen=True, eq=False)
class BlurPlan(Plan):
    """A round of chords.

    Attributes:
        blurs: the ends of the chords, one more than there are chords; held so that other questions find the same ones.
        walk: the chords before.
    """

    blurs: tuple[Instance, ...]
    walk: Walk


@dataclass(frozen=True)
class BlurIntegratedGradients(Method):
    """The gradient times what becomes sharper, integrated from the blurred instance to the instance.

    F(x') is the score of the blurriest instance. Blurs repeat edge values, as blurred baselines do.

    Attributes:
        step_count: chords, each with one gradient, at least 1.
        max_sigma: standard deviation of the strongest blur in elements, in (0, 1000].
        spacing: of the blurs: "linear" in the standard deviation, or in the "variance".

    Raises:
        InvalidRequest: STEP_COUNT_OUT_OF_RANGE, OPTION_OUT_OF_RANGE.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="path",
        units="output",
        complete=True,
        needs_baseline=False,
        deterministic=True,
        paper="Xu, Venugopalan, Sundararajan: Attribution in Scale and Space, CVPR 2020, arXiv:2004.03383",
    )

    step_count: int = 100
    max_sigma: float = 50.0
    spacing: str = "linear"

    def __post_init__(self) -> None:
        check_step_count("step_count", self.step_count)
        check_option("max_sigma", self.max_sigma, high=MAX_SIGMA)

    @property
    def needs(self) -> Needs:
        """Gradients, and something to blur."""
        return Needs(spatial_axes=True)

    def resolved(self, subject: Subject) -> Self:
        """The same, where every moving input can be blurred.

        Raises:
            Unsupported: one cannot (NO_SPATIAL_AXES).
        """
        for name, spec in subject.maps.items():
            if spec.spatial_axes is None:
                raise Unsupported(
                    "NO_SPATIAL_AXES",
                    f"input {name!r} states no layout with H and W axes, so it cannot be blurred; if others can, name "
                    "it in fixed_inputs",
                    input=name,
                    layout=spec.layout,
                )
        return self

    def cost(self, subject: Subject) -> Cost:
        """One gradient per chord, and the score of the blurriest instance."""
        return Cost.fixed(self.step_count, forward_rows=1)

    def path_bytes(self, subject: Subject) -> int:
        """The blurs and gradients of one round."""
        arrays = 2 * min(self.step_count, round_size(subject.element_count)) + WORKING_ARRAYS
        return arrays * FLOAT32_BYTES * subject.element_count

    def plan(self, question: Question) -> Plan:
        """The score of the blurriest instance, and the first chords."""
        return self._round(question, Walk())

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The next chords, or the map."""
        assert isinstance(plan, BlurPlan), "Not a plan of this method. This is a bug."
        walk, nodes = plan.walk, list(evaluation.segments)
        if not walk.scores:
            walk = walk.at(0.0, nodes.pop(0))
        for (start, end), node in zip(pairwise(plan.blurs), nodes, strict=True):
            middle = (walk.piece_count + 0.5) / self.step_count
            walk = walk.at(middle, node).along(way(start.moving, end.moving), gradients(node, question))
        return self._round(question, walk) if walk.piece_count < self.step_count else walk.attribution(question)

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The map if the rest of the path was one chord."""
        assert isinstance(upcoming, BlurPlan), "Not a plan of this method. This is a bug."
        return upcoming.walk.cut_short(question, upcoming.blurs[0].moving)

    def _round(self, question: Question, walk: Walk) -> Plan:
        pieces = next_round(question, walk.piece_count, self.step_count, MIN_ROUND)
        blurs = tuple(self._blur(question, index) for index in (*pieces, pieces.stop))
        chords = tuple(_chord(question, start, end) for start, end in pairwise(blurs))
        opening = () if walk.scores else (point(question, blurs[0].moving, question.score),)
        return BlurPlan((*opening, *chords), blurs, walk)

    def _blur(self, question: Question, index: int) -> Instance:
        """The instance after so many steps from the strongest blur."""
        sigma = self.max_sigma * _SHARES[self.spacing](1 - index / self.step_count)
        if index == self.step_count:
            return question.instance
        return question.instance.derived(("blur", sigma), lambda: _blurred(question, sigma))


def _blurred(question: Question, sigma: float) -> Instance:
    maps, instance = question.subject.maps, question.instance
    moving = {name: _blurred_input(x, sigma, maps[name].spatial_axes or ()) for name, x in instance.moving.items()}
    return Instance(moving, instance.fixed)


def _blurred_input(x: NDArray[np.generic], sigma: float, axes: tuple[int, ...]) -> NDArray[np.generic]:
    wide = x.astype(np.result_type(x.dtype, np.float32), copy=False)
    return np.ascontiguousarray(gaussian_blur(wide, sigma, axes), x.dtype)


def _chord(question: Question, start: Instance, end: Instance) -> Segment:
    """One gradient at its middle."""
    return Segment(
        start=start.moving,
        end=end.moving,
        fixed=question.instance.fixed,
        function=question.gradient,
        alphas=_MIDDLE,
        weights=_WHOLE,
        selectors=(question.target.selector,),
    )
