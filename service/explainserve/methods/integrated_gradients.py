"""Integrated Gradients (Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, equation 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Question, StopReason, Subject
from explainserve.methods.adaptive import (
    MIN_STEP_COUNT,
    PILOT_COUNT,
    SAMPLED_ELEMENTS,
    AdaptivePlan,
    Displacement,
    Path,
    Tolerances,
    next_round,
    pilot,
)
from explainserve.methods.contract import Cost, Method, ReadingGuide
from explainserve.methods.quadrature import RULES, check_step_count
from explainserve.plan import Evaluation, Plan, Segment

ADAPTIVE = "adaptive"
ADAPTIVE_DEFAULTS = {"tolerance": 0.05, "completeness_tolerance": 0.05, "max_step_count": 128}

_WORKING_ARRAYS = 24
"""Arrays of float32 that a path takes beside the gradients of its nodes: the displacement, the integral and what they
are computed with, in float64.
"""
_SAMPLE_COPIES = 3
_FLOAT32_BYTES, _FLOAT64_BYTES = 4, 8


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """(x - x') times the integral of the gradient along the straight line from x' to x.

    After construction every option has its effective value: `step_count` without `quadrature` means midpoint, neither
    means adaptive; the options of the adaptive rule are None for a fixed one.

    Attributes:
        step_count: gradient evaluations of a fixed rule, at least 1 (trapezoid: 2); None for adaptive.
        quadrature: a name in RULES, or "adaptive".
        tolerance: adaptive stops when the estimated relative L2 error of the map is at most this, in (0, 1], ...
        completeness_tolerance: ... and |delta| is at most this times max(|F(x) - F(x')|, .02 x sum|a|), in (0, 1].
        max_step_count: gradient evaluations of the adaptive rule, at least 16.

    Raises:
        InvalidRequest: UNKNOWN_QUADRATURE, QUADRATURE_CONFLICT, STEP_COUNT_OUT_OF_RANGE, TOLERANCE_OUT_OF_RANGE.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="path",
        units="output",
        complete=True,
        needs_baseline=True,
        deterministic=True,
        paper="Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, arXiv:1703.01365",
    )

    step_count: int | None = None
    quadrature: str | None = None
    tolerance: float | None = None
    completeness_tolerance: float | None = None
    max_step_count: int | None = None

    def __post_init__(self) -> None:
        if self.quadrature is None:
            object.__setattr__(self, "quadrature", ADAPTIVE if self.step_count is None else "midpoint")
        self._check_quadrature()
        if self.step_count is not None:
            self._check_no_adaptive_options()
            check_step_count("step_count", self.step_count, RULES[self._rule_name].min_step_count)
            return
        for option, value in ADAPTIVE_DEFAULTS.items():
            if getattr(self, option) is None:
                object.__setattr__(self, option, value)
        check_step_count("max_step_count", self._max_step_count, MIN_STEP_COUNT)
        _check_tolerance("tolerance", self._tolerances.map_error)
        _check_tolerance("completeness_tolerance", self._tolerances.completeness)

    def plan(self, question: Question) -> Plan:
        """All rows of a fixed rule in one segment, or the adaptive rule's pilot."""
        if self.step_count is None:
            return pilot(question)
        alphas, weights = RULES[self._rule_name].nodes_and_weights(self.step_count)
        segment = Segment(
            start=question.start,
            end=question.instance.moving,
            fixed=question.instance.fixed,
            function=question.gradient,
            alphas=alphas,
            weights=weights,
            selectors=(question.target.selector,),
        )
        return Plan((segment,))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The map; or, for the adaptive rule while it has not stopped, the next round.

        A map with NaN or infinite elements is returned as it is and says NON_FINITE.
        """
        if not isinstance(plan, AdaptivePlan):
            return _fixed_attribution(question, plan.segments[0], evaluation)
        path = plan.evaluated(question, evaluation)
        if not path.finite:
            return _adaptive_attribution(path, StopReason.NON_FINITE)
        reason = self._stop_reason(path)
        if reason is not None:
            return _adaptive_attribution(path, reason)
        upcoming = next_round(path, self._tolerances, self._max_step_count)
        return upcoming if upcoming.segments else _adaptive_attribution(path, StopReason.MAX_STEPS)

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The map of the adaptive rule before its next round, with TIME_BUDGET; a fixed rule has no next round."""
        assert isinstance(upcoming, AdaptivePlan) and upcoming.path is not None, "No round came before. This is a bug."
        return _adaptive_attribution(upcoming.path, StopReason.TIME_BUDGET)

    def cost(self, subject: Subject) -> Cost:
        """Rows of one path."""
        if self.step_count is None:
            return Cost(MIN_STEP_COUNT, self._max_step_count, PILOT_COUNT)
        return Cost.fixed(self.step_count)

    def path_bytes(self, subject: Subject) -> int:
        """The adaptive rule keeps a gradient for each node, and looks at a sample of all of them together."""
        element_count = subject.element_count
        node_count = 0 if self.step_count is not None else self._max_step_count
        sample_bytes = _SAMPLE_COPIES * _FLOAT64_BYTES * min(element_count, SAMPLED_ELEMENTS)
        return _FLOAT32_BYTES * element_count * (node_count + _WORKING_ARRAYS) + node_count * sample_bytes

    @property
    def _rule_name(self) -> str:
        return self.quadrature or ADAPTIVE

    @property
    def _tolerances(self) -> Tolerances:
        return Tolerances(cast(float, self.tolerance), cast(float, self.completeness_tolerance))

    @property
    def _max_step_count(self) -> int:
        return cast(int, self.max_step_count)

    def _stop_reason(self, path: Path) -> StopReason | None:
        """None where more rows may help."""
        if path.converged(self._tolerances):
            return StopReason.CONVERGED
        return StopReason.NON_CONVERGENT if path.stalled(self._tolerances) else None

    def _check_quadrature(self) -> None:
        known = (*RULES, ADAPTIVE)
        if self.quadrature not in known:
            raise InvalidRequest(
                "UNKNOWN_QUADRATURE",
                f"no quadrature {self.quadrature!r}; there are {', '.join(known)}",
                quadrature=self.quadrature,
                quadratures=", ".join(known),
            )
        if (self.quadrature == ADAPTIVE) != (self.step_count is None):
            needs = "takes max_step_count, not step_count" if self.quadrature == ADAPTIVE else "needs a step_count"
            raise InvalidRequest(
                "QUADRATURE_CONFLICT",
                f"quadrature {self.quadrature!r} {needs}",
                quadrature=self.quadrature,
                step_count=self.step_count,
            )

    def _check_no_adaptive_options(self) -> None:
        given = [option for option in ADAPTIVE_DEFAULTS if getattr(self, option) is not None]
        if given:
            raise InvalidRequest(
                "QUADRATURE_CONFLICT",
                f"{', '.join(given)} of the adaptive rule and step_count of a fixed rule exclude each other",
                options=", ".join(given),
                step_count=self.step_count,
            )


def _fixed_attribution(question: Question, segment: Segment, evaluation: Evaluation) -> Attribution:
    (evaluated,) = evaluation.segments
    displacement = Displacement.of(question)
    tensors = displacement.tensors(displacement.gradient(evaluated), question.instance.moving)
    path = _with_end_points(question, segment.alphas, evaluated.scores)
    return _attribution(tensors, path, segment.row_count, StopReason.FIXED_STEPS, None)


def _with_end_points(
    question: Question, alphas: NDArray[np.float64], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The score path with both ends, which closed rules have among their rows."""
    inside = (alphas > 0) & (alphas < 1)
    ends = question.start_output_value, question.instance_output_value
    return (
        np.concatenate([[0.0], alphas[inside], [1.0]]),
        np.concatenate([ends[:1], np.asarray(scores, np.float64)[inside], ends[1:]]),
    )


def _adaptive_attribution(path: Path, reason: StopReason) -> Attribution:
    tensors = path.displacement.tensors(path.gradient, path.question.instance.moving)
    map_error = path.map_error if path.finite and math.isfinite(path.map_error) else None
    return _attribution(tensors, path.score_path(), path.step_count, reason, map_error)


def _attribution(
    tensors: dict[str, NDArray[np.float32]],
    path: tuple[NDArray[np.float64], NDArray[np.float64]],
    step_count: int,
    reason: StopReason,
    map_error: float | None,
) -> Attribution:
    alphas, scores = path
    return Attribution(tensors, step_count, reason, map_error, alphas, scores).checked()


def _check_tolerance(option: str, value: float) -> None:
    if not 0 < value <= 1:  # refuses NaN too
        raise InvalidRequest(
            "TOLERANCE_OUT_OF_RANGE",
            f"{option} is {value}; expected more than 0 and at most 1",
            option=option,
            value=value,
            min=0,
            max=1,
        )
